"""The transforms, against what the published preprocessing computed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from janus_modular.interfaces import PixelSpec
from janus_modular.model.model import Understanding
from janus_modular.processing.image_transforms import generation_pixels, understanding_pixels

REFERENCE = Path(__file__).parents[2] / "fixtures" / "reference"
SPECS = {
    "pro": PixelSpec(),
    "clip": PixelSpec(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)),
}
CROPS = {"square": None, "wide": (0, 100, 512, 333), "tall": (60, 0, 257, 512), "tiny": (200, 50, 233, 61)}


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10_007 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def normalized(pixels: NDArray[np.uint8], spec: PixelSpec) -> NDArray[np.float32]:
    """Return pixels (3, H, W) as the model normalises them for its encoder."""
    encoder, adaptor = nn.Linear(1, 1), nn.Identity()
    encoder.pixels, encoder.grid = spec, lambda height, width: (1, 1)
    adaptor.num_tokens = lambda grid: 1
    return Understanding(encoder, adaptor).normalize(torch.from_numpy(pixels)[None])[0].numpy()


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("spec", SPECS)
def test_reference(spec: str, crop: str) -> None:
    image = Image.open(REFERENCE / "astronaut.png").convert("RGB")
    if CROPS[crop]:
        image = image.crop(CROPS[crop])
    x = normalized(understanding_pixels(image, SPECS[spec]), SPECS[spec])
    expected = np.load(REFERENCE / "expected.npz")
    # uint8 steps are 0.008 here: 1e-5 says that every pixel is the same one
    np.testing.assert_allclose(x[:, ::8, ::8], expected[f"pre_{spec}_{crop}_sub"], atol=1e-5)
    np.testing.assert_allclose(x.mean((1, 2)), expected[f"pre_{spec}_{crop}_mean"], atol=1e-5)


def test_sides_are_truncated_and_never_shorter_than_min_size() -> None:
    x = understanding_pixels(Image.new("RGB", (512, 233), "white"), PixelSpec())
    assert (x[0] == 255).any(1).sum() == int(233 / 512 * 384)  # 174.75 -> 174
    x = understanding_pixels(Image.new("RGB", (20_000, 10), "white"), PixelSpec())
    assert (x[0] == 255).any(1).sum() == 14
    assert understanding_pixels(noise(50, 1), PixelSpec(height=8, width=8)).shape == (3, 8, 8)


@pytest.mark.parametrize("resize", ["letterbox", "crop", "stretch"])
@pytest.mark.parametrize("size", [(1, 1), (20_000, 10), (10, 20_000), (31, 33)])
def test_resizes_any_size_to_any_frame(resize: str, size: tuple[int, int]) -> None:
    spec = PixelSpec(height=24, width=40, resize=resize)
    assert understanding_pixels(noise(*size), spec).shape == (3, 24, 40)
    assert generation_pixels(noise(*size), height=24, width=40).shape == (3, 24, 40)


def test_letterbox_in_a_frame_that_is_not_square() -> None:
    x = understanding_pixels(
        Image.new("RGB", (10, 10), "white"), PixelSpec(height=16, width=48, fill=(1, 2, 3))
    )
    assert (x[:, :, 16:32] == 255).all()
    assert x[:, 0, 0].tolist() == x[:, -1, -1].tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [(100, 80), (80, 101), (64, 64), (333, 50)])
def test_image_targets_are_resized_then_cropped(size: tuple[int, int]) -> None:
    image = noise(*size)
    scale = 32 / min(size)
    large = image.resize((int(size[0] * scale), int(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (large.width - 32) // 2, (large.height - 32) // 2
    expected = np.asarray(large.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1)
    got = generation_pixels(image, height=32, width=32)
    # the box is given in float32: single pixels may round the other way
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_image_targets_have_no_borders() -> None:
    assert (generation_pixels(Image.new("RGB", (90, 30), "white"), height=32, width=32) == 255).all()


def test_normalize_can_be_off() -> None:
    x = normalized(np.full((3, 2, 2), 255, np.uint8), PixelSpec(normalize=False))
    assert x.dtype == np.float32
    assert (x == 1).all()
