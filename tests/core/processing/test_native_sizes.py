"""Images in a size of their own: the rule of NaFlex, positions, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from janus_modular import PixelSpec
from janus_modular.processing.image_transforms import native_size, understanding_pixels

NATIVE = PixelSpec(height=64, width=64, resize="native", multiple=16)


@pytest.mark.parametrize("patches", [16, 256, 1024])
def test_sizes_are_those_of_siglip2s_processor(patches: int) -> None:
    rng = np.random.default_rng(patches)
    spec = replace(NATIVE, height=16 * int(patches**0.5), width=16 * int(patches**0.5))
    # Theirs searches scales up to 100, which do not suffice for images of a few pixels.
    sizes = [(6, 3000), (3000, 6), (16, 16), *rng.integers(6, 3000, (500, 2)).tolist()]
    for height, width in sizes:
        expected = get_image_size_for_max_num_patches(height, width, patch_size=16, max_num_patches=patches)
        assert native_size(height, width, spec) == tuple(expected), (height, width)


def test_pixels_are_the_whole_image_in_its_size() -> None:
    image = Image.effect_noise((90, 40), 100).convert("RGB")
    pixels = understanding_pixels(image, NATIVE)
    assert pixels.shape == (3, 48, 80)  # 3 x 5 squares of 16; 4 x 5 would be more than 16
    expected = np.asarray(image.resize((80, 48), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"resize": "native"}, "multiple: found None; expected the side of a position in pixels"),
        ({"resize": "native", "multiple": 0}, "multiple: found 0"),
        ({"resize": "native", "multiple": 15}, "multiple: found 15; expected a divisor of 64 and 64"),
        ({"resize": "native", "multiple": 64}, "multiple: found 64; expected less than the height and width"),
        ({"resize": "crop", "multiple": 16}, "multiple: found 16; it has no effect unless resize is native"),
    ],
)
def test_other_multiples_are_errors(options: dict[str, object], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PixelSpec(height=64, width=64, **options)  # type: ignore[arg-type]
