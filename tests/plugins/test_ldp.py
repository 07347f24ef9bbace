"""``ldp``: the published keys and shapes, and the arithmetic written out once more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from janus_modular import CheckpointError
from janus_modular.interfaces import ComponentSpec
from janus_modular.weights.pretrained import PretrainedReport, load_pretrained
from janus_plugins.adaptors.ldp import ANCHOR, LdpAdaptor, LdpConfig, gate_dim

C, D, GATE = 6, 40, 16  # a quarter of 40 is 10: 8 would be less than nine tenths of it


def published(c: int, d: int, gate: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of MobileVLM's projector: torchvision's InvertedResidual with timm's LayerNorm."""
    biased = {"mlp.1": (d, c), "mlp.3": (d, d)}
    bare = {}
    for block in ("mb_block.1.block", "mb_block.2.block"):
        bare |= {f"{block}.0.0": (d, 1, 3, 3), f"{block}.2.0": (d, d, 1, 1)}
        biased |= {f"{block}.0.1": (d,), f"{block}.2.1": (d,)}
        biased |= {f"{block}.1.fc1": (gate, d, 1, 1), f"{block}.1.fc2": (d, gate, 1, 1)}
    shapes = {f"{name}.weight": shape for name, shape in (biased | bare).items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in biased.items()}
    return {f"model.mm_projector.model.{name}": shape for name, shape in shapes.items()}


def random_weights() -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=chance) * 0.5 for name, shape in published(C, D, GATE).items()}


def read(weights: dict[str, Tensor], folder: Path) -> tuple[LdpAdaptor, PretrainedReport]:
    save_file(weights, folder / "model.safetensors")
    config = LdpConfig(pretrained=str(folder))
    adaptor = LdpAdaptor(config, C, D)
    return adaptor, load_pretrained(adaptor, ComponentSpec("adaptors", "ldp", config))


def written_out(weights: dict[str, Tensor], x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The published arithmetic, operator by operator, by the published names."""
    w = {name.removeprefix("model.mm_projector.model."): one for name, one in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:  # of the channels of (N, D, h, w)
        away = x - x.mean(1, keepdim=True)
        x = away / (away.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    x = F.gelu(x @ w["mlp.1.weight"].T + w["mlp.1.bias"]) @ w["mlp.3.weight"].T + w["mlp.3.bias"]
    x = x.transpose(1, 2).reshape(len(x), D, *grid)
    for i, stride in ((1, 1), (2, 2)):
        block = f"mb_block.{i}.block."
        y = F.conv2d(x, w[f"{block}0.0.weight"], stride=stride, padding=1, groups=D)
        y = norm(y, f"{block}0.1")
        y = y * (y + 3).clamp(0, 6) / 6  # hard swish
        gate = y.mean((2, 3))
        gate = F.relu(gate @ w[f"{block}1.fc1.weight"].flatten(1).T + w[f"{block}1.fc1.bias"])
        gate = gate @ w[f"{block}1.fc2.weight"].flatten(1).T + w[f"{block}1.fc2.bias"]
        y = y * ((gate + 3).clamp(0, 6) / 6)[..., None, None]
        y = norm(torch.einsum("nchw,dc->ndhw", y, w[f"{block}2.0.weight"].flatten(1)), f"{block}2.1")
        x = x + y if stride == 1 else y
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (3, 5)], ids=str)
@torch.no_grad()
def test_it_reads_mobilevlm_and_computes_what_is_published(grid: tuple[int, int], tmp_path: Path):
    weights = random_weights()
    x = torch.randn(2, grid[0] * grid[1], C)

    adaptor, report = read({**weights, "model.norm.weight": torch.ones(3)}, tmp_path)

    assert (report.loaded, report.unexpected_keys) == (len(weights), ["model.norm.weight"])
    # sums over 40 channels in another order, at values up to some ten
    torch.testing.assert_close(adaptor(x, grid), written_out(weights, x, grid), rtol=1e-4, atol=1e-4)


def test_the_published_sizes_have_the_published_shapes():
    """MobileVLM-1.7B: CLIP's 1024 to 2048; under 20 M parameters, as the paper has it."""
    with torch.device("meta"):
        adaptor = LdpAdaptor(LdpConfig(), 1024, 2048)
    wanted = published(1024, 2048, 512)
    assert sorted(tuple(x.shape) for x in adaptor.state_dict().values()) == sorted(wanted.values())
    assert sum(weight.numel() for weight in adaptor.parameters()) == 18_936_832


@pytest.mark.parametrize(("width", "inside"), [(2048, 512), (2560, 640), (40, 16), (72, 24), (16, 8)])
def test_the_gate_is_as_wide_as_mobilenets(width: int, inside: int):
    assert gate_dim(width) == inside


@pytest.mark.parametrize(("grid", "tokens"), [((4, 4), 4), ((3, 5), 6), ((1, 1), 1), ((24, 24), 144)])
def test_every_other_row_and_column_is_left(grid: tuple[int, int], tokens: int):
    adaptor = LdpAdaptor(LdpConfig(), C, D)
    assert adaptor.num_tokens(grid) == tokens
    assert adaptor(torch.randn(1, grid[0] * grid[1], C), grid).shape == (1, tokens, D)


def test_what_is_no_projector_or_not_all_of_it_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="pass a MobileVLM checkpoint"):
        read({"model.norm.weight": torch.ones(3)}, tmp_path)
    weights = random_weights()
    del weights["model.mm_projector.model.mb_block.2.block.1.fc2.bias"]
    with pytest.raises(CheckpointError, match=r"halve\.excite\.bias"):
        read(weights, tmp_path)


def test_what_the_projector_holds_besides_is_refused(tmp_path: Path):
    weights = random_weights()
    prefix = next(name for name in weights if name.endswith(ANCHOR)).removesuffix(ANCHOR)
    with pytest.raises(CheckpointError, match=r"1 unexpected:\n +\S*mlp\.5\.weight"):
        read({**weights, f"{prefix}mlp.5.weight": torch.zeros(1)}, tmp_path)
