"""The image tokenizer `vq`: shapes, half precision, and use of the codebook during training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from janus_plugins.image_tokenizers.vq import VqConfig, VqTokenizer

SMALL = {"channels": [8, 16], "num_codes": 16, "code_dim": 4, "continuous_steps": 3}


def make(**options: object) -> VqTokenizer:
    torch.manual_seed(0)
    return VqTokenizer(VqConfig(**{**SMALL, **options}))


def blobs(count: int, height: int = 16, width: int = 16) -> Tensor:
    """Smooth random images in [-1, 1]: something that can be compressed."""
    coarse = torch.rand(count, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (height, width), mode="bilinear") * 2 - 1


def train(tokenizer: VqTokenizer, steps: int, seed: int = 0) -> list[float]:
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 3e-3)
    pixels, told = blobs(32), []
    for _ in range(steps):
        losses = tokenizer.losses(pixels)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        told.append(losses["pixels"].item())
    return told


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24), (24, 10)])
def test_grids_need_not_be_square(height: int, width: int) -> None:
    tokenizer = make()
    codes = tokenizer.encode(blobs(2, 24, 24)[..., :height, :width])
    assert codes.shape == (2, math.prod(tokenizer.grid(height, width)))
    assert codes.dtype == torch.int64
    decoded = tokenizer.decode(codes, height=height, width=width)
    assert decoded.shape == (2, 3, height, width)
    assert decoded.isfinite().all()


def test_raster_order() -> None:
    """A change in one corner changes the codes of that corner's rows and columns only."""
    tokenizer = make(channels=[4, 4, 4]).eval()
    pixels = blobs(1, 32, 64)
    changed = pixels.clone()
    changed[..., :4, 60:] *= -1
    differ = (tokenizer.latents(pixels) - tokenizer.latents(changed)).abs().sum(-1).view(8, 16) > 0.05
    assert differ[0, 15]
    assert differ[:, -4:].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees(dtype: torch.dtype) -> None:
    tokenizer = make()
    train(tokenizer, 12)
    tokenizer.eval()
    pixels = blobs(8)
    codes = tokenizer.encode(pixels)
    half = copy.deepcopy(tokenizer).to(dtype)
    same = (half.encode(pixels.to(dtype)) == codes).float().mean()
    assert same > 0.8  # bfloat16 keeps 8 bits: latents near a border between two codes fall either way
    decoded = half.decode(codes, height=16, width=16)
    assert decoded.dtype == dtype
    # the same codes through the decoder: rounding alone, 3 digits in bfloat16
    torch.testing.assert_close(
        decoded.float(), tokenizer.decode(codes, height=16, width=16), atol=0.05, rtol=0
    )


def test_codebook_waits_then_starts_from_the_latents() -> None:
    tokenizer = make()
    before = tokenizer.codebook.clone()
    train(tokenizer, 3)
    assert torch.equal(tokenizer.codebook, before)
    train(tokenizer, 1)
    assert not torch.equal(tokenizer.codebook, before)
    latents = tokenizer.latents(blobs(32)).flatten(0, 1)
    near = (latents @ tokenizer.codebook.T).max(-1).values.mean()
    assert near > (latents @ before.T).max(-1).values.mean()


def test_training_lowers_the_loss_and_uses_the_codebook() -> None:
    tokenizer = make()
    told = train(tokenizer, 80)
    assert told[-1] < 0.5 * told[0]
    tokenizer.eval()
    assert len(tokenizer.encode(blobs(32)).unique()) >= 14
    torch.testing.assert_close(tokenizer.codebook.norm(dim=-1), torch.ones(16))


def test_idle_codes_are_put_back_to_work() -> None:
    tokenizer = make()
    train(tokenizer, 10)
    away = -F.normalize(tokenizer.latents(blobs(32)).flatten(0, 1).mean(0), dim=-1)
    tokenizer.codebook[3] = tokenizer.sums[3] = away.detach()
    tokenizer.counts[3] = 0
    train(tokenizer, 1)
    latents = tokenizer.latents(blobs(32)).flatten(0, 1)
    assert (latents @ tokenizer.codebook[3]).max() > 0.8  # it stands among the latents again


def test_goes_on_from_its_state_dict() -> None:
    """Interrupted before the quantiser starts, and after: the codebook's course is the same."""
    for steps in (2, 6):
        whole, part = make(), make()
        train(part, steps), train(whole, steps)
        resumed = make()
        resumed.load_state_dict(part.state_dict())
        assert train(resumed, 4, seed=5) == train(whole, 4, seed=5)
        assert torch.equal(resumed.codebook, whole.codebook)


def test_gradients_pass_the_quantiser() -> None:
    tokenizer = make(continuous_steps=0)
    tokenizer.losses(blobs(4))["pixels"].backward()
    gradient = tokenizer.encoder[0].weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"15x16 does not divide by its factor 2"):
        make().grid(15, 16)
    with pytest.raises(ValueError, match="at least one level"):
        make(channels=[])


@pytest.mark.parametrize("sizes", [{"num_codes": 60_000_000}, {"code_dim": 2_000_000, "num_codes": 64}])
def test_a_codebook_of_any_size_is_refused_before_it_is_made(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"a codebook of [\d,]+ numbers; expected at most 67,108,864"):
        VqConfig(**{**SMALL, **sizes})
