"""Damaged image files: they are opened as far as Pillow repairs them, or refused."""

from __future__ import annotations

from io import BytesIO
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from janus_modular.errors import ImageError
from janus_modular.processing.image_io import open_image

MOST = 10_000
"""Pixels of an opened image: a damaged header may promise more than the machine has memory for."""


def files() -> dict[str, bytes]:
    """Return a file of each common format, with transparency, frames and an orientation if it has these."""
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (20, 30, 4), dtype=np.uint8) for _ in range(2)]
    rgba, second = (Image.fromarray(array) for array in pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {}
    for name, image, options in [
        ("PNG", rgba, {"exif": exif}),
        ("JPEG", rgba.convert("RGB"), {"exif": exif}),
        ("WEBP", rgba, {"exif": exif}),
        ("GIF", rgba.convert("P"), {"save_all": True, "append_images": [second.convert("P")]}),
        ("TIFF", rgba.convert("I;16"), {}),
        ("BMP", rgba.convert("RGB"), {}),
    ]:
        file = BytesIO()
        image.save(file, name, **options)
        made[name] = file.getvalue()
    return made


FILES = files()


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_a_damaged_file_is_an_image_or_an_error(
    mutations: ModuleType, name: str, data: st.DataObject
) -> None:
    content = data.draw(mutations.damaged_bytes(FILES[name]))
    image = mutations.read_or_refused(
        lambda: open_image(content, max_pixels=MOST), ImageError, f"the image ({len(content):,} bytes)"
    )
    if image is not None:
        assert image.mode == "RGB"
        assert image.width * image.height <= MOST
        assert len(image.tobytes()) == 3 * image.width * image.height  # it is decoded


@given(content=st.binary(max_size=300))
def test_any_bytes_are_an_image_or_an_error(mutations: ModuleType, content: bytes) -> None:
    mutations.read_or_refused(lambda: open_image(content, max_pixels=MOST), ImageError, "the image (")
