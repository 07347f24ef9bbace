"""A third-party backbone without attention: checked, trained, exported, verified, drawn from and asked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.runtimes.trt.session import chunks
from janus_export.tensorrt_build import build as building
from janus_export.tensorrt_build import targets
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_export.verify import verify
from janus_modular import ConfigError, Message, PromptError, Sample, TensorSpec, Text
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.model.session import TorchRuntime
from janus_modular.plugins import Plugins
from janus_modular.sequence import Sequence
from janus_modular.serving import AnswerRequest, Engine
from janus_modular.testing import BackboneContract, RuntimeContract
from janus_modular.testing.examples import prompt
from janus_modular.testing.serving import alone, ensure_same

PLUGIN = Path(__file__).with_name("recurrent_backbone.py")
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 sums in another order; states are of size 1


def recurrent(plugins: Plugins) -> dict[str, Any]:
    plugins.add_file(PLUGIN)
    return {**load("model/tiny", plugins=plugins), "backbone": {"name": "recurrent"}}


@pytest.fixture
def checkpoint(shared: Path, plugins: Plugins, filled_once: Any) -> Path:
    raw = recurrent(plugins)

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, plugins=plugins), plugins)
        for weight in assembly.model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
        save(assembly, folder, plugins=plugins)

    return filled_once(shared / "recurrent_checkpoint", write)


needs_bundle = pytest.mark.slow  # its export takes as long as that of a whole model


@pytest.fixture
def bundle(shared: Path, checkpoint: Path, filled_once: Any) -> Path:
    config = ExportConfig(variants=["fp32", "fp16"])
    return filled_once(shared / "recurrent_bundle", lambda folder: export(checkpoint, folder, config))


@pytest.fixture
def opened(checkpoint: Path) -> Janus:
    return Janus.from_pretrained(checkpoint)


class TestItsContract(BackboneContract):
    @pytest.fixture(autouse=True)
    def _of_plugins(self, plugins: Plugins) -> None:
        plugins.add_file(PLUGIN)
        self.entry = plugins.entry("backbones", "recurrent")

    def make(self) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        return self.entry.factory(self.entry.config()), torch.randint(320, (3, 7))


@torch.no_grad()
def test_it_is_the_recurrence_position_by_position(plugins: Plugins):
    plugins.add_file(PLUGIN)
    entry = plugins.entry("backbones", "recurrent")
    torch.manual_seed(0)
    layer = entry.factory(entry.config()).layers[0]
    x = torch.randn(1, 9, 32)
    normed = layer.norm(x)
    q, k, v = layer.query_key_value(normed).unflatten(-1, (3, 2, 8))[0].unbind(1)  # (T, H, 8) each
    decay = layer.decay(normed).sigmoid()[0]  # (T, H)
    state, outputs = torch.zeros(2, 8, 8), []
    for t in range(9):
        state = decay[t, :, None, None] * state + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
        outputs.append((q[t].unsqueeze(-2) @ state).flatten())
    expected = x + layer.output(torch.stack(outputs))
    torch.testing.assert_close(layer(x, torch.arange(9)[None], None), expected, **CLOSE)


class TestItsSessionsInTorch(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_model(self, opened: Janus) -> None:
        self.runtime = opened.runtime

    def make(self) -> tuple[TorchRuntime, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]


@needs_bundle
class TestItsSessionsInOnnxRuntime(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_a_bundle(self, bundle: Path) -> None:
        self.runtime = Janus.from_pretrained(bundle).runtime

    def make(self) -> tuple[Any, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3), prompt(4)]


@needs_bundle
class TestItsSessionsOnEngines(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _of_engines(self, bundle: Path, tmp_path: Path, machine: Any, build_engines: Any) -> None:
        folder = shutil.copytree(bundle, tmp_path / "built")
        build_engines(folder, "fp32", "tensorrt", capacity=64)
        options = {"name": "tensorrt", "chunk": 2}
        self.runtime = Janus.from_pretrained(folder, runtime=options).runtime

    def make(self) -> tuple[Any, list[Sequence]]:
        return self.runtime, [prompt(1, 2, 3, 4, 5), prompt(4)]


@needs_bundle
def test_its_manifest_holds_its_states(bundle: Path):
    manifest = load_bundle(bundle).manifest
    graph = manifest["graphs"]["backbone"]
    assert [tensor["name"] for tensor in graph["inputs"]] == [
        "x", "positions", "counts", "past_state_0", "past_state_1",
    ]  # fmt: skip
    assert graph["inputs"][3]["shape"] == ["rows", 2, 8, 8]
    assert graph["aliases"] == []
    assert graph["states"] == [["present_state_0", "past_state_0"], ["present_state_1", "past_state_1"]]
    assert manifest["cache"]["layers"] == 0
    assert manifest["cache"]["states"] == ["past_state_0", "past_state_1"]


@needs_bundle
def test_its_bundle_answers_and_draws_as_torch_does(opened: Janus, bundle: Path):
    exported = Janus.from_pretrained(bundle, runtime={"name": "onnx", "chunk": 5})
    for question in ("what?", "a longer question"):
        assert exported.chat(question, max_tokens=6) == opened.chat(question, max_tokens=6)
    expected, images = (janus.draw(["a", "two dogs"], 1, seed=3) for janus in (opened, exported))
    assert np.array_equal(np.stack(images.encoded), np.stack(expected.encoded))
    for image, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(image, int) - np.asarray(other, int)).max() <= 1


@needs_bundle
@pytest.mark.parametrize("layers", [False, True])
def test_its_bundle_is_verified(checkpoint: Path, bundle: Path, tmp_path: Path, layers: bool):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    [report] = verify(folder, checkpoint, variants=["fp32"], layers=layers)
    assert report.failures == ""
    names = {check.name for checks in report.checks.values() for check in checks}
    assert ("layer 1" if layers else "states of idle rows") in names


@needs_bundle
def test_a_graph_that_adds_padding_to_its_states_is_reported(
    checkpoint: Path, bundle: Path, workshop_of: Any
):
    workshop = workshop_of(bundle, "fp32")

    def keep_all(model: ir.Model) -> None:
        counts = next(value for value in model.graph.inputs if value.name == "counts")
        many = ir.node("Constant", [], {"value": ir.tensor(np.array([1000]))})
        users = list(counts.uses())
        total = ir.node("Max", [counts, many.outputs[0]])
        for node, index in users:
            node.replace_input_with(index, total.outputs[0])
        model.graph.insert_before(model.graph[0], [many, total])

    workshop.graph("backbone", keep_all)
    [report] = verify(workshop.folder, checkpoint, variants=["fp32"], gates=["cache"])
    assert "states of idle rows: 2 changed" in report.failures


@needs_bundle
def test_its_graph_becomes_an_engine(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Built by TensorRT-RTX itself, which needs no GPU for that."""
    for module in (targets, building):
        monkeypatch.setattr(module, "compute_capability", lambda: None)
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    _, built = build(folder, BuildConfig("tensorrt-rtx", "fp16", ["8.9"], capacity=64, graphs=["backbone"]))
    assert built == ["backbone"]


def test_a_row_is_not_cut_to_where_its_state_is_not_known(opened: Janus):
    session = opened.runtime.open(16, rows=2)
    session.admit([prompt(1, 2, 3), prompt(4, 5)], [0, 1])
    with pytest.raises(PromptError, match=r"found length 1 for row 1; expected 2, .*extend"):
        session.truncate([3, 1])
    assert session.lengths.tolist() == [3, 2]
    cache = session.cache
    with pytest.raises(PromptError, match="found length 2 for row 0"):
        cache.truncate(torch.tensor([2, 2]))
    x, positions = torch.zeros(2, 2, 32), torch.tensor([[3, 4], [2, 3]])
    opened.model.backbone(x, positions=positions, cache=cache)
    with pytest.raises(ValueError, match=r"found counts \[1, 1\]; expected \[2, 2\].*call keep"):
        cache.advance(torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "are empty"),
        (["state"], "expected a list of janus_modular.TensorSpec"),
        ([TensorSpec("s", "model", ("rows", 2)), TensorSpec("s", "model", ("rows", 3))], "called s, s"),
        ([TensorSpec("s", "model", (2, "rows"))], "expected 'rows' first"),
        ([TensorSpec("s", "model", ("rows", "tokens"))], "expected 'rows' first"),
        ([TensorSpec("s", "int64", ("rows", 2))], "of 'int64'; expected model or float32"),
    ],
)
def test_a_cache_that_cannot_be_carried_is_refused_by_name(
    plugins: Plugins, tensors: list[Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    raw = recurrent(plugins)
    entry = plugins.entry("backbones", "recurrent")
    built = entry.factory(entry.config())
    built.cache_tensors = tensors
    monkeypatch.setattr(entry.factory, "__new__", lambda cls, config: built)
    monkeypatch.setattr(entry.factory, "__init__", lambda self, config: None)
    with pytest.raises(ConfigError, match=f"(?s)'recurrent'.*{message}"):
        ModelAssembly.from_config(resolve(raw, ModelConfig, plugins=plugins), plugins)


def test_packed_rows_have_the_loss_of_single_sequences(plugins: Plugins):
    """The loss of sequences in one row is that of each alone, and a step lowers it."""
    raw = recurrent(plugins)
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, plugins=plugins), plugins)
    samples = [
        Sample([Message("user", [Text("a")]), Message("assistant", [Text(answer)])])
        for answer in ("bc", "def")
    ]
    sequences = [assembly.processor.sequence(sample) for sample in samples]
    packed = assembly.model(collate([sequences])).losses["text"]
    alone = torch.cat([assembly.model(collate([sequence])).losses["text"] for sequence in sequences])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=0)  # float32 sums in another order
    optimizer = torch.optim.SGD(assembly.model.parameters(), lr=0.1)
    packed.mean().backward()
    optimizer.step()
    assert assembly.model(collate([sequences])).losses["text"].mean() < packed.mean()


def test_chunks_of_recurrent_layers_do_not_overlap():
    assert chunks(10, 1, 4, overlap=False) == [(0, 4), (4, 4), (8, 2)]
    assert chunks(3, 1, 4, overlap=False) == [(0, 3)]
    assert chunks(2, 4, 4, overlap=False) == [(0, 4)]


def test_it_is_served_though_its_rows_keep_no_prompts(opened: Janus):
    requests = [AnswerRequest(f"the same beginning of them all {i}", max_new_tokens=5) for i in range(4)]
    requests.append(AnswerRequest(requests[0].prompt, max_new_tokens=5))
    with Engine(opened, rows=2) as engine:
        for request, job in [(request, engine.submit(request)) for request in requests]:
            ensure_same(request, job.result(20), alone(opened, request))
        assert engine.stats().reused_positions == 0
