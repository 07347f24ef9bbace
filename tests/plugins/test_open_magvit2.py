"""Open-MAGVIT2's tokenizer: the published names and sizes, its arithmetic by other formulas, its losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular.errors import CheckpointError
from janus_modular.interfaces import ComponentSpec
from janus_modular.weights.loading import load_weights
from janus_modular.weights.pretrained import load_pretrained
from janus_plugins.image_tokenizers.open_magvit2 import (
    AdaptiveGroupNorm,
    OpenMagvit2Config,
    OpenMagvit2Tokenizer,
    Upsample,
)


def make(**options: object) -> OpenMagvit2Tokenizer:
    torch.manual_seed(0)
    small = {"channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1, "bits": [2, 3]}
    return OpenMagvit2Tokenizer(OpenMagvit2Config(**{**small, **options}))


def image(rows: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published_shapes(
    multipliers: tuple[int, ...], bits: int = 18, ch: int = 128
) -> dict[str, tuple[int, ...]]:
    """Name what SEED-Voken's VQModel of ``ch_mult: multipliers`` keeps of encoder and decoder."""
    shapes: dict[str, tuple[int, ...]] = {}
    last, top = len(multipliers) - 1, ch * multipliers[-1]

    def residual(name: str, width: int, wide: int) -> None:
        for i, channels in ((1, width), (2, wide)):
            shapes[f"{name}.norm{i}.weight"] = shapes[f"{name}.norm{i}.bias"] = (channels,)
            shapes[f"{name}.conv{i}.weight"] = (wide, channels, 3, 3)
        if width != wide:
            shapes[f"{name}.nin_shortcut.weight"] = (wide, width, 1, 1)

    def with_bias(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    shapes["encoder.conv_in.weight"] = (ch, 3, 3, 3)
    width = ch
    for i, multiplier in enumerate(multipliers):
        for j in range(4):
            residual(f"encoder.down.{i}.block.{j}", width, ch * multiplier)
            width = ch * multiplier
        if i < last:
            with_bias(f"encoder.down.{i}.downsample", width, width, 3, 3)
    with_bias("decoder.conv_in", top, bits, 3, 3)
    for half, j in product(("encoder", "decoder"), range(4)):
        residual(f"{half}.mid_block.{j}", top, top)
    with_bias("encoder.norm_out", top)
    with_bias("encoder.conv_out", bits, top, 1, 1)
    for i in range(last, -1, -1):
        with_bias(f"decoder.adaptive.{i}.gamma", width, bits)
        with_bias(f"decoder.adaptive.{i}.beta", width, bits)
        for j in range(4):
            residual(f"decoder.up.{i}.block.{j}", width, ch * multipliers[i])
            width = ch * multipliers[i]
        if i:
            with_bias(f"decoder.up.{i}.upsample.conv1", 4 * width, width, 3, 3)
    with_bias("decoder.norm_out", width)
    with_bias("decoder.conv_out", 3, width, 3, 3)
    return shapes


@pytest.mark.parametrize("multipliers", [(1, 1, 2, 2, 4), (1, 2, 2, 4)])
def test_names_and_shapes_are_the_published_ones(multipliers: tuple[int, ...]) -> None:
    with torch.device("meta"):
        tokenizer = OpenMagvit2Tokenizer(OpenMagvit2Config(channel_multipliers=list(multipliers)))
    found = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    assert found == published_shapes(multipliers)
    assert tokenizer.codebooks == (64, 4096)


def test_the_default_is_as_large_as_the_published_file_says() -> None:
    """imagenet_256_L.ckpt has 921 MB: every weight twice in float32, as it was trained and averaged."""
    with torch.device("meta"):
        tokenizer = OpenMagvit2Tokenizer(OpenMagvit2Config())
    assert sum(p.numel() for p in tokenizer.parameters()) * 2 * 4 == pytest.approx(921e6, rel=1e-3)


def residual(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Compute a residual block from weights by their published names, one operation at a time."""
    y = x
    for i in (1, 2):
        weight, bias = w[f"{name}.norm{i}.weight"], w[f"{name}.norm{i}.bias"]
        y = F.silu(F.group_norm(y, 8, weight, bias, eps=1e-6))  # all of 8 channels here, or pairs of 16
        y = F.conv2d(y, w[f"{name}.conv{i}.weight"], padding=1)
    shortcut = w.get(f"{name}.nin_shortcut.weight")
    return y + (x if shortcut is None else F.conv2d(x, shortcut))


@torch.no_grad()
def test_layers_follow_each_other_as_published() -> None:
    """Encoder and decoder of two resolutions, by their weights' names; only norms of tiny widths differ."""
    tokenizer = make()
    for weight in tokenizer.parameters():
        nn.init.normal_(weight, std=0.3)
    for module in tokenizer.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 8
    w = dict(tokenizer.state_dict())

    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w.get(f"{name}.bias"), **options)

    def last(half: str, x: Tensor) -> Tensor:
        x = F.group_norm(x, 8, w[f"{half}.norm_out.weight"], w[f"{half}.norm_out.bias"], eps=1e-6)
        return conv(f"{half}.conv_out", F.silu(x), padding=0 if half == "encoder" else 1)

    x = conv("encoder.conv_in", image(), padding=1)
    x = conv("encoder.down.0.downsample", residual(w, "encoder.down.0.block.0", x), stride=2, padding=1)
    x = residual(w, "encoder.mid_block.0", residual(w, "encoder.down.1.block.0", x))
    torch.testing.assert_close(tokenizer.encoder(image()), last("encoder", x))

    z = torch.randn(2, 5, 4, 6).sign()
    spread, mean = (z.flatten(2).var(-1) + 1e-6).sqrt(), z.flatten(2).mean(-1)
    x = residual(w, "decoder.mid_block.0", conv("decoder.conv_in", z, padding=1))
    for i in (1, 0):
        scale, shift = (
            F.linear(y, w[f"decoder.adaptive.{i}.{name}.weight"], w[f"decoder.adaptive.{i}.{name}.bias"])
            for name, y in (("gamma", spread), ("beta", mean))
        )
        x = F.group_norm(x, 8, eps=1e-6) * scale[..., None, None] + shift[..., None, None]
        x = residual(w, f"decoder.up.{i}.block.0", x)
        if i:
            deep = conv("decoder.up.1.upsample.conv1", x, padding=1)  # (2, 4 * 16, 4, 6)
            x = deep.view(2, 2, 2, 16, 4, 6).permute(0, 3, 4, 1, 5, 2).reshape(2, 16, 8, 12)
    torch.testing.assert_close(tokenizer.decoder(z), last("decoder", x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_codes_are_the_signs_of_latents_lowest_bit_first() -> None:
    tokenizer = make()
    latents = tokenizer.encoder(image())  # (2, 5, 4, 6)

    codes = tokenizer.encode(image())

    expected = [
        [
            sum(2**bit for bit in range(count) if latents[row, first + bit, at // 6, at % 6] > 0)
            for first, count in ((0, 2), (2, 3))
        ]
        for row in range(2)
        for at in range(24)
    ]
    assert codes.view(-1, 2).tolist() == expected


@torch.no_grad()
def test_one_code_has_the_bits_of_several() -> None:
    whole, parts = make(bits=[5]), make()
    whole.load_state_dict(parts.state_dict())
    codes, by_code = whole.encode(image()), parts.encode(image())
    assert codes.shape == (2, 24)
    assert torch.equal(codes, by_code[..., 0] + 4 * by_code[..., 1])
    size = {"height": 8, "width": 12}
    torch.testing.assert_close(whole.decode(codes, **size), parts.decode(by_code, **size))


@torch.no_grad()
def test_vectors_of_a_positions_codes_add_up_to_what_is_decoded() -> None:
    tokenizer = make()
    codes = tokenizer.encode(image())
    vectors = tokenizer.codebook_embeddings()

    added = vectors[codes[..., 0]] + vectors[4 + codes[..., 1]]  # (2, 24, 5)

    assert torch.equal(added > 0, tokenizer.encoder(image()).flatten(2).transpose(1, 2) > 0)
    assert set(added.flatten().tolist()) == {-1.0, 1.0}
    decoded = tokenizer.decoder(added.transpose(1, 2).unflatten(2, (4, 6)))
    torch.testing.assert_close(tokenizer.decode(codes, height=8, width=12), decoded)


@torch.no_grad()
def test_vectors_and_images_come_in_the_weights_dtype() -> None:
    """A checkpoint that is opened in half precision leaves constants in float32."""
    tokenizer = make()
    for weight in tokenizer.parameters():
        weight.data = weight.data.bfloat16()
    assert tokenizer.signs.dtype == torch.float32
    assert tokenizer.codebook_embeddings().dtype == torch.bfloat16
    codes = tokenizer.encode(image())
    assert tokenizer.decode(codes, height=8, width=12).dtype == torch.bfloat16


@torch.no_grad()
def test_upsampling_spreads_depth_over_space() -> None:
    up = Upsample(3)
    x = torch.randn(2, 3, 4, 5)
    deep, wide = up.conv1(x), up(x)
    assert wide.shape == (2, 3, 8, 10)
    for i, j in product(range(2), range(2)):  # the block's row and column choose the channels
        assert torch.equal(wide[:, :, i::2, j::2], deep[:, 3 * (2 * i + j) : 3 * (2 * i + j) + 3])


@torch.no_grad()
def test_adaptive_norm_gets_spread_and_mean_of_the_latents() -> None:
    torch.manual_seed(0)
    tokenizer = make()
    latents = torch.randn(2, 5, 4, 6)
    told: list[tuple[Tensor, ...]] = []
    hooks = [
        one.register_forward_pre_hook(lambda _, args: told.append(args)) for one in tokenizer.decoder.adaptive
    ]
    tokenizer.decoder(latents)
    assert len(hooks) == len(told) == 2
    for x, spread, mean in told:
        torch.testing.assert_close(spread, (latents.flatten(2).var(-1) + 1e-6).sqrt())
        torch.testing.assert_close(mean, latents.mean((2, 3)))
        layer = AdaptiveGroupNorm(5, x.shape[1])
        scale, shift = (one(y)[..., None, None] for one, y in ((layer.gamma, spread), (layer.beta, mean)))
        expected = F.group_norm(x, layer.gn.num_groups, eps=1e-6) * scale + shift
        torch.testing.assert_close(layer(x, spread, mean), expected)


def test_entropy_of_one_code_is_the_published_formula() -> None:
    tokenizer = make(bits=[4], entropy_temperature=0.5)
    z = torch.randn(3, 7, 4)
    codebook = torch.tensor(list(product((-1.0, 1.0), repeat=4)))
    probs = (2 * z @ codebook.T / 0.5).softmax(-1).flatten(0, 1)
    each = -(probs * probs.log()).sum(-1).mean()
    use = probs.mean(0)
    torch.testing.assert_close(tokenizer.entropy_loss(z), each + (use * (use + 1e-5).log()).sum())


def test_entropies_of_choices_add_up_over_codes() -> None:
    """Bits are independent given a latent: what is split off loses nothing of H(p)."""
    z = torch.randn(6, 1, 5)  # one latent at a time: its use is its choice, but for the 1e-5 in the logarithm
    whole = make(bits=[5], entropy_temperature=2.0)

    def entropy(one: Tensor, bits: int) -> Tensor:
        signs = torch.tensor(list(product((-1.0, 1.0), repeat=bits)))
        probs = (2 * one @ signs.T / 2.0).softmax(-1)
        return -(probs * probs.log()).sum()

    for one in z:
        torch.testing.assert_close(entropy(one, 5), entropy(one[:, :2], 2) + entropy(one[:, 2:], 3))
    assert abs(whole.entropy_loss(z[0]).item()) < 1e-3


def test_losses_reach_encoder_and_decoder_through_the_signs() -> None:
    tokenizer = make()
    losses = tokenizer.losses(image())
    assert set(losses) == {"pixels", "commitment", "entropy"}
    assert set(make(entropy=0.0).losses(image())) == {"pixels", "commitment"}
    losses["pixels"].backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_a_few_steps_on_its_losses_paint_an_image_better(taught: Callable[..., list[float]]) -> None:
    tokenizer = make()
    history = taught(tokenizer, steps=20)
    assert history[-1] < 0.5 * history[0]


def published_file(tokenizer: OpenMagvit2Tokenizer, *, averaged: bool) -> dict[str, Tensor]:
    """Return what a checkpoint of theirs holds, as it was trained: zeros where averages are beside them."""
    state = tokenizer.state_dict()
    offered = {name: torch.zeros_like(x) if averaged else x for name, x in state.items()}
    offered["loss.discriminator.main.0.weight"] = torch.zeros(1)
    if averaged:
        offered |= {f"model_ema.{name.replace('.', '')}": x for name, x in state.items()}
        offered |= {
            "model_ema.decay": torch.tensor(0.999),
            "model_ema.num_updates": torch.tensor(0),
        }
    return offered


@pytest.mark.parametrize("averaged", [True, False])
def test_reads_the_published_files_averages_first(averaged: bool, tmp_path: Path) -> None:
    source, target = make(), make()
    nn.init.normal_(source.encoder.conv_in.weight)
    file = {"epoch": 1, "stranger": torch.zeros(1), "state_dict": published_file(source, averaged=averaged)}
    torch.save(file, tmp_path / "imagenet_256_L.ckpt")
    config = replace(target.config, pretrained=str(tmp_path))

    report = load_pretrained(target, ComponentSpec("image_tokenizers", "open-magvit2", config))

    torch.testing.assert_close(target.state_dict(), source.state_dict())
    assert report.loaded == len(source.state_dict())
    assert report.unexpected_keys == ["stranger"]


def test_a_missing_weight_is_named_and_strange_files_are_refused() -> None:
    target = make()
    offered = published_file(make(), averaged=True)
    del offered["model_ema.decoderadaptive1gammaweight"]
    with pytest.raises(CheckpointError, match=r"1 missing:\n.*decoder.adaptive.1.gamma.weight"):
        load_weights(target, target.read_pretrained(offered)).check("the file")
    with pytest.raises(CheckpointError, match="no encoder: no name ends in"):
        load_weights(target, target.read_pretrained({"decoder.conv_in.weight": torch.zeros(1)}))


def test_sizes_that_do_not_fit() -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match="7x8 is no multiple of 2"):
        tokenizer.grid(7, 8)
    with pytest.raises(ValueError, match="have 1 positions; expected 2 or more"):
        tokenizer.grid(2, 2)
    with pytest.raises(ValueError, match="23 positions do not fill 4x6"):
        tokenizer.decode(torch.zeros(1, 23, 2, dtype=torch.int64), height=8, width=12)
    with pytest.raises(ValueError, match="at most 18: split"):
        make(bits=[19])
    assert math.prod(tokenizer.grid(2, 4)) == 2
