"""Errors of layers that cannot be exported name the layer and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from janus_export.bundle.axes import Ranges
from janus_export.errors import ExportError
from janus_export.onnx_export.graphs import Graph, declare
from janus_export.onnx_export.trace import faked, to_onnx
from janus_modular import ConfigError, TensorSpec
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
GPTJ = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "rotary_dim": 4}


def composed(family: str, **config: Any) -> Any:
    keys = json.dumps({**SMALL, **config, "model_type": family})
    return ModelAssembly.from_config(resolve(load("model/tiny", [f"backbone.config={keys}"]), ModelConfig))


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            "qwen3_next",  # keeps the state of a linear attention
            {**EXPERTS, "mlp_only_layers": [0, 1], "layer_types": ["full_attention", "linear_attention"]},
            r"backbone\.model\.model\.layers\.1\.linear_attn \(Qwen3NextGatedDeltaNet\) uses"
            r" 'get_conv_state' of its cache.*choose a backbone with attention layers only",
        ),
        (
            "gptj",  # attends by itself, and would add a mask of booleans to its scores
            GPTJ,
            r"backbone \(HfBackbone\) raises: 'gptj' cannot decode.*transformer\.h\.0 \(GPTJBlock\)"
            r".*AttentionInterface.*Choose a family",
        ),
        (
            "mamba2",  # takes no notice of our cache
            {"num_heads": 8, "head_dim": 8},
            r"backbone \(HfBackbone\) raises: 'mamba2'.*backbone\.layers\.0 \(Mamba2Block\), .*layers\.1",
        ),
        (
            "qwen3_moe",  # sends tokens to experts by their values
            EXPERTS,
            r"backbone\.model\.model\.layers\.0\.mlp\.experts \(Qwen3MoeExperts\) cannot be traced by torch",
        ),
    ],
)
def test_a_backbone_says_which_of_its_layers_and_why(
    family: str, config: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]
):
    model = composed(family, **config).model
    capfd.readouterr()
    with faked(model), pytest.raises(ExportError, match=f"the graph 'backbone' cannot be exported: {said}"):
        declare(model, Ranges.of(context=model.backbone.context))
    assert capfd.readouterr().err == ""  # torch prints its own account, which is long


def test_attention_that_ignores_the_mask_is_an_error_in_sessions_too():
    model = composed("gptj", **GPTJ).model
    backbone = model.backbone
    for _ in range(2):  # not only the first time
        with pytest.raises(ConfigError, match=r"transformer\.h\.1 \(GPTJBlock\)"):
            backbone(
                torch.zeros(1, 1, 32), positions=torch.zeros(1, 1).long(), cache=backbone.new_cache(1, 4)
            )


def test_the_command_says_so_and_leaves_nothing_behind(tmp_path: Path):
    save(
        composed("qwen3_next", **EXPERTS, layer_types=["linear_attention", "full_attention"]), tmp_path / "m"
    )
    run = CliRunner().invoke(app, ["export", str(tmp_path / "m"), str(tmp_path / "bundle"), "--quiet"])
    assert run.exit_code == 2
    assert "layers.0.linear_attn" in run.output.replace("\n", "")
    assert not (tmp_path / "bundle").exists()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Selecting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x.sum(-1) > 0]


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 4).flip(0)


class Numpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3]


class Elsewhere(nn.Module):
    """Branches in eager mode, and selects in a graph."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            return torch.where(x.sum() > 0, x, -x)
        return x if x.sum() > 0 else -x


class Top(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"part": nn.Sequential(nn.Linear(4, 4), inner)})

    def forward(self, x: Tensor) -> Tensor:
        return self.model["part"](x)


def toy(inner: nn.Module) -> Any:
    top = Top(inner)
    inputs, outputs = (TensorSpec("x", "float32", ("rows", 4)),), (TensorSpec("y", "float32", ("rows", 4)),)
    graph = Graph("toy", top, inputs, outputs, torch.float32, Ranges.of(context=16))
    return to_onnx(graph, faked(top))


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (
            Branching,
            r"part\.1 \(Branching\) has control flow or shapes that depend on values.*torch\.where",
        ),
        (Numpy, r"part\.1 \(Numpy\) cannot be traced by torch \(RuntimeError.*is_exporting"),
        (Selecting, r"'y' is traced as \(u0, 4\), where \(rows, 4\) was declared"),
        (Wrong, r"'y' is traced as \(rows, 3\), where \(rows, 4\) was declared"),
        (Fixed, "fixes the length of rows"),
    ],
)
def test_a_module_says_what_it_does_that_no_graph_can(
    inner: Callable[[], nn.Module], said: str, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(ExportError, match=f"the graph 'toy' cannot be exported: .*{said}"):
        toy(inner())
    assert capfd.readouterr().err == ""


def test_a_module_may_take_another_way_in_a_graph():
    assert "Where" in [node.op_type for node in toy(Elsewhere()).graph]


def test_a_backbone_that_remembers_nothing_is_refused():
    class Forgetful(nn.Module):
        hidden_size, vocab_size, context = 4, 8, 16

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, x: Tensor, *, positions: Tensor, cache: Any = None) -> Tensor:
            return x

    model = composed("llama").model
    model.backbone = Forgetful()
    with faked(model), pytest.raises(ExportError, match="Forgetful wrote no keys and values into its cache"):
        declare(model, Ranges.of(context=16))
