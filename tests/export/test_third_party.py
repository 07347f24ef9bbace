"""Third-party components are exported: without code for ONNX, or with translations of their own operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from janus_export.errors import ExportError
from janus_export.onnx_export.graphs import Graph
from janus_export.onnx_export.translations import TRANSLATIONS, all_translations, linear
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins

Lower = Callable[[JanusModel, str], tuple[Graph, ir.Model]]

EXAMPLE = Path(__file__).parents[2] / "plugins" / "examples" / "efficientnet_lite0.py"
CLOSE = 1e-4  # of the largest number: float32 sums in another order
STRANGE = '''
"""Encoders that use what ONNX has no operator for."""
from dataclasses import dataclass
import torch
from janus_modular import ComponentConfig, PixelSpec, Registry, UnderstandingEncoder, hookimpl

@torch.library.custom_op("acme::fold", mutates_args=())
def fold(x: torch.Tensor, width: float) -> torch.Tensor:
    return torch.from_numpy(abs(x.numpy() % (2 * width) - width))

@fold.register_fake
def _(x, width):
    return torch.empty_like(x)

@dataclass
class FoldConfig(ComponentConfig):
    """Nothing to choose."""

class Fold(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.feature_dim, self.pixels = config, 16, PixelSpec(height=32, width=32)
        self.rows = torch.nn.Linear(3 * 8 * 8, self.feature_dim)
    def grid(self, height, width):
        return height // 8, width // 8
    def forward(self, pixels):
        x = torch.nn.functional.unfold(pixels, 8, stride=8).transpose(1, 2)
        return torch.ops.acme.fold(self.rows(x), 0.5)

class FoldWithOnnx(Fold):
    def onnx_translations(self):
        from onnxscript import opset23 as op
        def fold(x, width):
            twice = op.CastLike(2 * width, x)
            rest = op.Sub(x, op.Mul(twice, op.Floor(op.Div(x, twice))))
            return op.Abs(op.Sub(rest, op.CastLike(width, x)))
        return {torch.ops.acme.fold.default: fold}

@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    registry.add("fold", Fold, FoldConfig)
    registry.add("fold-onnx", FoldWithOnnx, FoldConfig)
'''


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plugins") / "fold.py"
    file.write_text(STRANGE, "utf-8")
    return file


def build(plugins: Plugins, file: Path, *overrides: str) -> JanusModel:
    plugins.add_file(file)
    torch.manual_seed(0)
    model = ModelAssembly.from_config(
        resolve(load("tiny", list(overrides), plugins), ModelConfig, plugins), plugins
    ).model
    return model.eval()


@torch.no_grad()
def assert_same_embeddings(model: JanusModel, lower: Lower) -> None:
    """Compare the graph `understand` with torch, for as many images as it was not traced with."""
    spec = model.understanding.encoder.pixels
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, spec.height, spec.width), np.uint8)
    want = model.understanding(torch.from_numpy(pixels)).numpy()
    onnx = lower(model, "understand")[1]
    assert {node.domain for node in onnx.graph} == {""}
    session = onnxruntime.InferenceSession(ir.to_proto(onnx).SerializeToString())
    (got,) = session.run(None, {"pixels": pixels})
    np.testing.assert_allclose(got, want, rtol=0, atol=CLOSE * np.abs(want).max())


@pytest.mark.slow
def test_an_encoder_that_knows_nothing_of_onnx(plugins: Plugins, lower: Lower):
    encoder = "understanding.encoder"
    sizes = (f"{encoder}.height=32", f"{encoder}.width=64")
    assert_same_embeddings(build(plugins, EXAMPLE, f"{encoder}=efficientnet-lite0", *sizes), lower)


@pytest.mark.slow
def test_siglip2_which_transformers_feeds_images_one_by_one(plugins: Plugins, lower: Lower):
    """Its position tables are resized for each image; here all have one size, and their number is free."""
    sizes = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48"
    family = f"{{model_type: siglip2_vision_model, {sizes}, patch_size: 8, num_patches: 16}}"
    words = ("understanding.encoder=hf-vision", f"understanding.encoder.config={family}")
    assert_same_embeddings(build(plugins, EXAMPLE, *words), lower)


def test_an_operator_without_translation_is_an_error_with_its_module_and_a_hint(
    plugins: Plugins, strange: Path, lower: Lower
):
    model = build(plugins, strange, "understanding.encoder=fold")
    with pytest.raises(
        ExportError,
        match=r"'understand' cannot be exported: understanding.encoder \(Fold\) uses the operator"
        r" acme.fold.default.*onnx_translations",
    ):
        lower(model, "understand")


def test_a_component_can_say_how_its_operator_is_written_in_onnx(
    plugins: Plugins, strange: Path, lower: Lower
):
    assert_same_embeddings(build(plugins, strange, "understanding.encoder=fold-onnx"), lower)


class Bringing(torch.nn.Module):
    """A component that brings translations."""

    def __init__(self, **translations: Any) -> None:
        super().__init__()
        self.translations = translations

    def onnx_translations(self) -> dict[Any, Any]:
        return {getattr(torch.ops.aten, name).default: one for name, one in self.translations.items()}


def test_what_components_bring_joins_what_the_export_has():
    def relu(x: Any) -> Any:
        return x

    module = torch.nn.ModuleDict({"one": Bringing(relu=relu, linear=linear), "other": Bringing(relu=relu)})
    assert all_translations(module) == {**TRANSLATIONS, torch.ops.aten.relu.default: relu}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (
            Bringing(relu=lambda x: x),
            Bringing(relu=lambda x: x),
            r"other \(Bringing\).*relu.*one \(Bringing\)",
        ),
        (Bringing(linear=lambda x: x), torch.nn.ReLU(), r"one \(Bringing\).*aten.linear.*the export itself"),
    ],
    ids=["another component", "the export"],
)
def test_two_translations_of_one_operator_are_refused(one: Any, other: Any, said: str):
    with pytest.raises(ExportError, match=said):
        all_translations(torch.nn.ModuleDict({"one": one, "other": other}))
