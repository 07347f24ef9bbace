"""LlamaGen's VQ model against the published numbers, transformers' own class, and any shape of image."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusVQVAE, JanusVQVAEConfig

from janus_modular import CheckpointError
from janus_plugins.image_tokenizers.llamagen import LlamaGenConfig, LlamaGenTokenizer

PREFIX = "gen_vision_model."


def tiny(**options: object) -> LlamaGenTokenizer:
    torch.manual_seed(0)
    sizes: dict[str, object] = {
        "channels": 8,
        "channel_multipliers": [1, 2, 2],
        "residual_blocks": 1,
        "latent_channels": 12,
        "num_codes": 32,
        "code_dim": 4,
    }
    return LlamaGenTokenizer(LlamaGenConfig(**{**sizes, **options})).eval()  # type: ignore[arg-type]


def load(tokenizer: LlamaGenTokenizer, weights: dict[str, Tensor]) -> None:
    tokenizer.load_state_dict(dict(tokenizer.read_pretrained(weights)))


@pytest.fixture(scope="module")
def published(reference_weights: Callable[[str], dict[str, Tensor]]) -> LlamaGenTokenizer:
    """The whole VQ-16 with the fixture's weights (1 s to build, 1 s to fill)."""
    tokenizer = LlamaGenTokenizer(LlamaGenConfig()).eval()
    load(tokenizer, reference_weights(PREFIX))
    return tokenizer


@torch.inference_mode()
@pytest.mark.slow
def test_decodes_the_published_pixels(published: LlamaGenTokenizer, expected: dict[str, np.ndarray]) -> None:
    pixels = published.decode(torch.from_numpy(expected["vq_ids"]), height=384, width=384)[0]

    scale = float(expected["vq_decoded_std"])
    # fp32 sums in another order: 1e-4 of the scale
    np.testing.assert_allclose(pixels[:, ::8, ::8], expected["vq_decoded_sub"], atol=1e-4 * scale, rtol=0)
    assert abs(float(pixels.mean()) - float(expected["vq_decoded_mean"])) < 1e-4 * scale
    assert abs(float(pixels.std()) - scale) < 1e-4 * scale


@torch.inference_mode()
@pytest.mark.slow
def test_encodes_the_published_codes(
    published: LlamaGenTokenizer, expected: dict[str, np.ndarray], astronaut: Tensor
) -> None:
    np.testing.assert_allclose(astronaut[0, :, ::8, ::8], expected["pre_pro_square_sub"], atol=1e-6)

    codes = published.encode(astronaut)[0]

    assert (codes.numpy() == expected["vq_encoded_ids"]).mean() >= 0.995  # the rest are ties within rounding


@pytest.mark.parametrize(
    ("multipliers", "count"), [([1, 1, 2, 2, 4], 71_883_403), ([1, 2, 2, 4], 70_109_835)]
)
def test_vq16_and_vq8_have_the_published_numbers_of_parameters(multipliers: list[int], count: int) -> None:
    with torch.device("meta"):
        tokenizer = LlamaGenTokenizer(LlamaGenConfig(channel_multipliers=multipliers))
    assert sum(weight.numel() for weight in tokenizer.parameters()) == count
    assert tokenizer.factor == 2 ** (len(multipliers) - 1)


@torch.inference_mode()
def test_equals_transformers_on_random_weights_read_from_its_format() -> None:
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1, latent_channels=32, num_embeddings=64,
        embed_dim=4, num_patches=6,
    )  # fmt: skip
    theirs = JanusVQVAE(config).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.1)
    rows = theirs.quantize.embedding.weight
    rows.data = F.normalize(rows.data, dim=-1)  # theirs normalises in decode alone; equal where rows are unit
    ours = tiny(channels=32, channel_multipliers=[1, 2], latent_channels=32, num_codes=64)
    load(ours, {f"model.vqmodel.{name}": weight for name, weight in theirs.state_dict().items()})
    codes = torch.randint(64, (2, 36))
    pixels = torch.rand(2, 3, 12, 12) * 2 - 1

    # theirs returns channels last
    decoded = theirs.decode(codes)
    torch.testing.assert_close(ours.decode(codes, height=12, width=12), decoded, atol=1e-5, rtol=1e-4)
    latents = ours.encoder(pixels)
    torch.testing.assert_close(latents, theirs.encoder(pixels), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(8, 8), (8, 20), (24, 4)])
def test_any_multiple_of_the_factor_goes_round_in_raster_order(size: tuple[int, int]) -> None:
    tokenizer = tiny()
    height, width = size
    pixels = torch.rand(2, 3, height, width) * 2 - 1

    codes = tokenizer.encode(pixels)

    assert codes.shape == (2, math.prod(tokenizer.grid(height, width)))
    assert tokenizer.decode(codes, height=height, width=width).shape == pixels.shape
    # raster order: the grid that decode paints from is the grid that the encoder made
    latents = tokenizer.quant_conv(tokenizer.encoder(pixels))  # (N, c, h, w)
    last = F.normalize(latents[:, :, -1, -1], dim=-1)
    torch.testing.assert_close(codes[:, -1], tokenizer.quantize.nearest(last))


def test_sizes_that_do_not_fit_are_errors_that_name_both_numbers() -> None:
    tokenizer = tiny()
    with pytest.raises(ValueError, match="10x8 is no multiple of 4"):
        tokenizer.grid(10, 8)
    with pytest.raises(ValueError, match="10x8 is no multiple of 4"):
        tokenizer.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match="5 codes do not fill a grid of 2x2"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.long), height=8, width=8)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_end_to_end_in_half_precision(dtype: torch.dtype) -> None:
    full, half = tiny(), tiny().to(dtype)
    pixels = torch.rand(1, 3, 8, 12) * 2 - 1
    codes = full.encode(pixels)

    decoded = half.decode(codes, height=8, width=12)

    assert half.encode(pixels).shape == codes.shape
    assert decoded.dtype == dtype
    scale = float(full.decode(codes, height=8, width=12).std())
    error = (decoded.float() - full.decode(codes, height=8, width=12)).abs().max()
    assert error < 25 * torch.finfo(dtype).eps * scale  # about 25 layers round one after the other
    assert all(loss.isfinite() for loss in half.losses(pixels.to(dtype)).values())


def test_codes_are_the_nearest_by_angle_whatever_the_length_of_rows() -> None:
    tokenizer = tiny()
    rows = tokenizer.quantize.embedding.weight
    rows.data *= torch.rand(32, 1) * 9 + 1
    pixels = torch.rand(1, 3, 8, 8)
    latents = tokenizer.quant_conv(tokenizer.encoder(pixels)).flatten(2).transpose(1, 2)

    cosine = F.cosine_similarity(latents.unsqueeze(2), rows, dim=-1)  # (1, P, K)

    assert torch.equal(tokenizer.encode(pixels), cosine.argmax(-1))
    torch.testing.assert_close(tokenizer.codebook_embeddings().norm(dim=-1), torch.ones(32))


def test_without_l2_norm_codes_are_the_nearest_by_distance() -> None:
    tokenizer = tiny(l2_norm=False)
    tokenizer.quantize.embedding.weight.data.normal_()
    latents = torch.randn(2, 5, 4)

    distances = torch.cdist(latents, tokenizer.codebook_embeddings().expand(2, -1, -1))

    assert torch.equal(tokenizer.quantize.nearest(latents), distances.argmin(-1))


def test_losses_reach_encoder_codebook_and_decoder() -> None:
    tokenizer = tiny(entropy=0.1)

    losses = tokenizer.losses(torch.rand(2, 3, 8, 8) * 2 - 1)
    sum(losses.values(), torch.zeros(())).backward()

    assert set(losses) == {"pixels", "codebook", "commitment", "entropy"}
    for name in ("encoder.conv_in", "quantize.embedding", "decoder.conv_out"):
        gradient = tokenizer.get_submodule(name).weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_a_few_steps_on_its_losses_paint_an_image_better(taught: Callable[..., list[float]]) -> None:
    tokenizer = tiny()
    history = taught(tokenizer, steps=8)
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("prefix", ["", "ema.", "model.", "state_dict.", PREFIX, "model.vqmodel."])
def test_reads_its_weights_from_under_every_name(prefix: str) -> None:
    source, target = tiny(), tiny()
    nn.init.normal_(source.post_quant_conv.weight)
    offered = {f"{prefix}{name}": weight for name, weight in source.state_dict().items()}
    offered[f"{prefix}quantize.codebook_used"] = torch.zeros(65536)
    offered["language_model.lm_head.weight"] = torch.zeros(1)

    load(target, offered)

    torch.testing.assert_close(target.post_quant_conv.weight, source.post_quant_conv.weight)


def test_prefers_averaged_weights_and_refuses_files_without_a_codebook() -> None:
    source, target = tiny(), tiny()
    state = source.state_dict()
    both = {f"model.{name}": torch.zeros_like(weight) for name, weight in state.items()}

    load(target, both | {f"ema.{name}": weight for name, weight in state.items()})

    torch.testing.assert_close(target.state_dict(), state)
    with pytest.raises(CheckpointError, match="no codebook"):
        load(target, {"encoder.conv_in.weight": torch.zeros(1)})
