"""Cosmos' discrete image tokenizer: the published names, wavelets and levels by other formulas, its loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular.errors import CheckpointError, DescriptionError
from janus_modular.interfaces import ComponentSpec
from janus_modular.weights.loading import load_weights
from janus_modular.weights.pretrained import load_pretrained
from janus_plugins.image_tokenizers.convolutional import Attention
from janus_plugins.image_tokenizers.fsq import FsqConfig, FsqTokenizer, Wavelets

Shapes = dict[str, tuple[int, ...]]


def make(**options: object) -> FsqTokenizer:
    torch.manual_seed(0)
    small = {
        "channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1, "patch_size": 2, "factor": 4,
        "latent_channels": 8, "levels": [4, 3],
    }  # fmt: skip
    return FsqTokenizer(FsqConfig(**{**small, **options}))


def image(rows: int = 2, height: int = 8, width: int = 12) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def published_shapes(factor: int, patch: int) -> Shapes:
    """Name what Cosmos' DiscreteImageTokenizer keeps, but for constants: 128 channels, times 2, 4 and 4."""
    shapes: Shapes = {}
    widths = [256, 512, 512]
    halvings = int(math.log2(factor / patch))

    def with_bias(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def residual(name: str, width: int, wide: int) -> None:
        for i, channels in ((1, width), (2, wide)):
            with_bias(f"{name}.norm{i}", channels)
            with_bias(f"{name}.conv{i}", wide, channels, 3, 3)
        if width != wide:
            with_bias(f"{name}.nin_shortcut", wide, width, 1, 1)

    with_bias("encoder.conv_in", 128, 3 * patch**2, 3, 3)
    width = 128
    for i, wide in enumerate(widths):
        for j in range(2):
            residual(f"encoder.down.{i}.block.{j}", width, wide)
            width = wide
        if i < halvings:
            with_bias(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
    for half in ("encoder", "decoder"):
        residual(f"{half}.mid.block_1", 512, 512)
        residual(f"{half}.mid.block_2", 512, 512)
        with_bias(f"{half}.mid.attn_1.norm", 512)
        for name in ("q", "k", "v", "proj_out"):
            with_bias(f"{half}.mid.attn_1.{name}", 512, 512, 1, 1)
    with_bias("encoder.norm_out", 512)
    with_bias("encoder.conv_out", 256, 512, 3, 3)
    with_bias("quant_conv", 6, 256, 1, 1)
    with_bias("post_quant_conv", 256, 6, 1, 1)
    with_bias("decoder.conv_in", 512, 256, 3, 3)
    for i in (2, 1, 0):
        for j in range(3):
            residual(f"decoder.up.{i}.block.{j}", width, widths[i])
            width = widths[i]
        if i >= 3 - halvings:
            with_bias(f"decoder.up.{i}.upsample.conv", width, width, 3, 3)
    with_bias("decoder.norm_out", 256)
    with_bias("decoder.conv_out", 3 * patch**2, 256, 3, 3)
    return shapes


@pytest.mark.parametrize(("factor", "patch"), [(16, 4), (8, 4), (16, 2), (8, 2)])
def test_names_and_shapes_are_the_published_ones(factor: int, patch: int) -> None:
    with torch.device("meta"):
        tokenizer = FsqTokenizer(FsqConfig(factor=factor, patch_size=patch))
    found = {name: tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    assert found == published_shapes(factor, patch)
    assert tokenizer.codebooks == (64_000,)
    assert tokenizer.code_dim == 6


def test_one_group_of_norms_is_the_whole_width() -> None:
    """Cosmos-Tokenize1-DI16x16-360p; the weights have the same shapes, so only the config can say it."""
    groups = {one.num_groups for one in make(norm_groups=1).modules() if isinstance(one, nn.GroupNorm)}
    assert groups == {1}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_wavelets_are_haars_and_come_back(size: int) -> None:
    """By convolutions with low and high passes along both sides, on all channels again and again."""
    x = image()
    low, high = torch.tensor([1.0, 1.0]) / math.sqrt(2), torch.tensor([1.0, -1.0]) / math.sqrt(2)
    expected = x
    for _ in range(int(math.log2(size))):
        channels = expected.shape[1]
        kinds = [torch.outer(rows, columns) for columns, rows in product((low, high), repeat=2)]
        expected = torch.cat(
            [
                F.conv2d(expected, kind.expand(channels, 1, 2, 2), stride=2, groups=channels) / 2
                for kind in kinds
            ],
            dim=1,
        )

    found = Wavelets(size)(x)

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(Wavelets(size, inverse=True)(found), x)
    if size == 4:
        torch.testing.assert_close(found[:, :3], F.avg_pool2d(x, 4))  # the mean comes first


def test_attention_is_one_softmax_over_all_positions() -> None:
    torch.manual_seed(0)
    layer = Attention(8, groups=4)
    x = torch.randn(2, 8, 3, 5)
    y = F.group_norm(x, 4, eps=1e-6)
    q, k, v = (one(y).flatten(2) for one in (layer.q, layer.k, layer.v))  # (2, 8, 15)
    seen = torch.einsum("nkp,ncp->nck", (torch.einsum("nck,ncp->nkp", q, k) / math.sqrt(8)).softmax(-1), v)
    torch.testing.assert_close(layer(x), x + layer.proj_out(seen.unflatten(2, (3, 5))))


@torch.no_grad()
def test_layers_follow_each_other_as_published() -> None:
    """Encoder and decoder of two resolutions, by their weights' names; only norms of tiny widths differ."""
    tokenizer = make()  # patches of 2, then one halving: the second resolution has none
    for weight in tokenizer.parameters():
        nn.init.normal_(weight, std=0.3)
    for module in tokenizer.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 4
    w = dict(tokenizer.state_dict())

    def conv(name: str, x: Tensor, padding: int = 1, stride: int = 1) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)

    def norm(name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 4, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def residual(name: str, x: Tensor) -> Tensor:
        y = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        y = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", y)))
        return y + (conv(f"{name}.nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in w else x)

    def middle(half: str, x: Tensor) -> Tensor:
        x = residual(f"{half}.mid.block_1", x)
        x = tokenizer.get_submodule(f"{half}.mid.attn_1")(x)  # it has a test of its own
        return residual(f"{half}.mid.block_2", x)

    x = residual("encoder.down.0.block.0", conv("encoder.conv_in", Wavelets(2)(image())))
    x = conv("encoder.down.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), 0, stride=2)
    x = middle("encoder", residual("encoder.down.1.block.0", x))
    expected = conv("encoder.conv_out", F.silu(norm("encoder.norm_out", x)))
    torch.testing.assert_close(tokenizer.encoder(image()), expected, rtol=1e-4, atol=1e-4)

    z = torch.randn(2, 8, 2, 3)
    x = middle("decoder", conv("decoder.conv_in", z))
    for j in range(2):
        x = residual(f"decoder.up.1.block.{j}", x)
    x = conv("decoder.up.1.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for j in range(2):
        x = residual(f"decoder.up.0.block.{j}", x)
    x = conv("decoder.conv_out", F.silu(norm("decoder.norm_out", x)))
    expected = Wavelets(2, inverse=True)(x)
    torch.testing.assert_close(tokenizer.decoder(z), expected, rtol=1e-4, atol=1e-4)


def test_every_level_is_reached_in_order() -> None:
    """Of 5 levels as of 8, from the lowest to the highest, each over a stretch of latents."""
    tokenizer = make(levels=[8, 5])
    latents = torch.linspace(-4, 4, 2001)[:, None].expand(-1, 2)
    rounded = tokenizer._bounded(latents).round()
    for column, levels in zip(rounded.unbind(1), (8, 5), strict=True):
        values = column.unique_consecutive()
        assert values.tolist() == [float(i - levels // 2) for i in range(levels)]
        assert (column == 0).sum() > 50  # around zero too: an even number of levels is shifted


def test_codes_count_the_levels_of_the_first_number_first() -> None:
    tokenizer = make()
    expected = [((i - 2) / 2, float(j - 1)) for j in range(3) for i in range(4)]  # 4 and 3 levels
    assert tokenizer.codebook_embeddings().tolist() == [list(one) for one in expected]


@torch.no_grad()
def test_what_is_decoded_is_the_nearest_vector_of_each_bounded_latent() -> None:
    tokenizer = make(levels=[8, 5])
    tokenizer.quant_conv.weight.data *= 50  # so that all sorts of codes come up
    pixels = image(4, 16, 16)
    codes = tokenizer.encode(pixels)
    assert len(codes.unique()) > 10
    latents = tokenizer.quant_conv(tokenizer.encoder(pixels)).flatten(2).transpose(1, 2)
    bounded = tokenizer._bounded(latents) / torch.tensor([4, 2])
    distances = torch.cdist(
        bounded * torch.tensor([4.0, 2.0]), tokenizer.codebook_embeddings() * torch.tensor([4.0, 2.0])
    )
    assert torch.equal(codes, distances.argmin(-1))


def test_the_loss_reaches_encoder_and_decoder_through_the_rounding() -> None:
    tokenizer = make()
    losses = tokenizer.losses(image())
    assert set(losses) == {"pixels"}
    losses["pixels"].backward()
    for name in ("encoder.conv_in", "quant_conv", "decoder.conv_out"):
        assert tokenizer.get_submodule(name).weight.grad.abs().sum() > 0


def test_a_few_steps_on_its_loss_paint_an_image_better(taught: Callable[..., list[float]]) -> None:
    history = taught(make(levels=[8, 8]), steps=20)
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("prefix", ["", "network.", "model.network."])
def test_reads_published_weights_and_knows_their_constants(prefix: str, tmp_path: Path) -> None:
    source, target = make(), make()
    nn.init.normal_(source.quant_conv.weight)
    constants = {
        "encoder.patcher.wavelets": torch.zeros(2),
        "decoder.unpatcher._arange": torch.zeros(2),
        "quantizer._levels": torch.tensor(source.config.levels),
        "quantizer.implicit_codebook": source.codebook_embeddings().to(torch.bfloat16),
    }
    offered = source.state_dict() | constants
    file = {f"{prefix}{name}": x for name, x in offered.items()} | {"stranger": torch.zeros(1)}
    torch.save(file, tmp_path / "model.pt")
    config = replace(target.config, pretrained=str(tmp_path / "model.pt"))

    report = load_pretrained(target, ComponentSpec("image_tokenizers", "fsq", config))

    torch.testing.assert_close(target.state_dict(), source.state_dict())
    assert report.loaded == len(source.state_dict())
    assert report.unexpected_keys == ["stranger"]


@pytest.mark.parametrize("levels", [[4, 4], [8, 2], [2, 8], [3, 5]])
@pytest.mark.parametrize("table", ["quantizer._levels", "quantizer.implicit_codebook"])
def test_levels_of_another_tokenizer_are_refused(table: str, levels: list[int]) -> None:
    source, target = make(levels=levels), make(levels=[5, 3])  # of the same shapes
    tables = {
        "quantizer._levels": torch.tensor(levels),
        "quantizer.implicit_codebook": source.codebook_embeddings(),
    }
    offered = source.state_dict() | {table: tables[table]}
    with pytest.raises(DescriptionError, match=re.escape(f"levels: found [5, 3], expected {levels}")):
        load_weights(target, target.read_pretrained(offered))


def test_a_missing_weight_is_named_and_strange_files_are_refused() -> None:
    target = make()
    offered = dict(make().state_dict())
    del offered["decoder.mid.attn_1.q.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing:\n.*decoder.mid.attn_1.q.bias"):
        load_weights(target, target.read_pretrained(offered)).check("the file")
    with pytest.raises(CheckpointError, match="no encoder: no name ends in"):
        load_weights(target, target.read_pretrained({"decoder.conv_in.weight": torch.zeros(1)}))


def test_sizes_that_do_not_fit() -> None:
    tokenizer = make()
    with pytest.raises(ValueError, match="6x8 is no multiple of 4"):
        tokenizer.grid(6, 8)
    with pytest.raises(ValueError, match="5 codes do not fill a grid of 2x3"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.int64), height=8, width=12)
    with pytest.raises(ValueError, match="factor: 12; expected a power of two"):
        make(factor=12)
    with pytest.raises(ValueError, match="factor 32 takes 4 halvings after patches of 2; expected 0 to 2"):
        make(factor=32)
    with pytest.raises(ValueError, match=r"levels: \[1\]; expected each at least 2"):
        make(levels=[1])
