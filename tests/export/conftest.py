"""One tiny checkpoint and its bundle, exported once for all tests of a run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from janus_export.bundle.axes import Ranges
from janus_export.bundle.bundle import load_bundle, write_manifest
from janus_export.bundle.contract import MAGNITUDE
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.onnx_export.graphs import Graph, declare
from janus_export.onnx_export.trace import faked, to_onnx
from janus_export.reference.target import Reference
from janus_export.verify import Report, verify
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins

Change = Callable[[ir.Model], None]
Lower = Callable[[JanusModel, str], tuple[Graph, ir.Model]]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pytest-xdist's workers have in common."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder


@contextmanager
def made_once(folder: Path) -> Iterator[bool]:
    """Say whether ``folder`` is still to be made; other workers wait until it is."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not folder.exists()


def save_random(raw: dict[str, Any], folder: Path, plugins: Plugins | None = None) -> None:
    """Save the model of a config with weights of std 0.3: larger than at the start of a training, so that
    choices are clear, and errors too.
    """
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, plugins=plugins), plugins)
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    save(assembly, folder, plugins=plugins)


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: Path) -> Path:
    """configs/model/tiny with random weights; read only."""
    folder = shared / "tiny_checkpoint"
    with made_once(folder) as missing:
        if missing:
            save_random(load("model/tiny"), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(shared: Path, tiny_checkpoint: Path) -> Path:
    """The bundle of `tiny_checkpoint` in fp32, cpu-int8 and cpu-int4; read only: copy it to change it."""
    folder = shared / "tiny_bundle"
    with made_once(folder) as missing:
        if missing:
            export(tiny_checkpoint, folder, ExportConfig(variants=["fp32", "cpu-int8", "cpu-int4"]))
    return folder


@pytest.fixture(scope="session")
def drawing_bundle(shared: Path, tiny_checkpoint: Path) -> Path:
    """Of `tiny_checkpoint`, for drawing alone, in 4 bits, in files of 64 KB at most; read only."""
    folder = shared / "drawing_bundle"
    with made_once(folder) as missing:
        if missing:
            config = ExportConfig(variants=["cpu-int4"], only=["drawing"], max_file_size="64KB")
            export(tiny_checkpoint, folder, config)
    return folder


FLOW_PATH = Path(__file__).with_name("flow_path.py")
SEVERAL = {
    "name": "autoregressive", "height": 32, "width": 16, "embedding_dim": 24, "adaptor": "mlp",
    "tokenizer": {
        "name": "open-magvit2", "channels": 8, "channel_multipliers": [1, 1, 2, 2], "residual_blocks": 1,
        "bits": [3, 4],
    },
    "head": {"name": "factorized", "layers": 2, "heads": 2, "hidden": 32},
}  # fmt: skip


@pytest.fixture
def several_codes_checkpoint(shared: Path, plugins: Plugins) -> Path:
    """configs/model/tiny whose images have 4 x 2 positions of two codes, of 8 and of 16; read only."""
    folder = shared / "several_codes_checkpoint"
    with made_once(folder) as missing:
        if missing:
            save_random({**load("model/tiny"), "generation": SEVERAL}, folder, plugins)
    return folder


@pytest.fixture
def several_codes_bundle(shared: Path, several_codes_checkpoint: Path) -> Path:
    """The bundle of `several_codes_checkpoint` in fp32 and fp16; read only: copy it to change it."""
    folder = shared / "several_codes_bundle"
    with made_once(folder) as missing:
        if missing:
            export(several_codes_checkpoint, folder, ExportConfig(variants=["fp32", "fp16"]))
    return folder


@pytest.fixture
def flow_checkpoint(shared: Path, plugins: Plugins) -> Path:
    """configs/model/tiny with the path of `flow_path`, with random weights; read only."""
    plugins.add_file(FLOW_PATH)
    folder = shared / "flow_checkpoint"
    with made_once(folder) as missing:
        if missing:
            raw = {**load("model/tiny", plugins=plugins), "generation": {"name": "flow"}}
            save_random(raw, folder, plugins)
    return folder


@pytest.fixture
def flow_bundle(shared: Path, flow_checkpoint: Path) -> Path:
    """The bundle of `flow_checkpoint` in fp32, fp16 and cpu-int8; read only: copy it to change it."""
    folder = shared / "flow_bundle"
    with made_once(folder) as missing:
        if missing:
            export(flow_checkpoint, folder, ExportConfig(variants=["fp32", "fp16", "cpu-int8"]))
    return folder


@pytest.fixture(scope="session")
def lower() -> Lower:
    """Lower one graph of a model in memory, and put back the weights that fakes stood for."""

    def lowered(model: JanusModel, name: str) -> tuple[Graph, ir.Model]:
        weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
        mode = faked(model)
        with mode:
            graphs = declare(model, Ranges.of(context=model.backbone.context, capacity=64))
        graph = next(one for one in graphs if one.name == name)
        onnx = to_onnx(graph, mode)
        for key, value in onnx.graph.initializers.items():
            if key.removeprefix("model.") in weights:
                value.const_value = ir.tensor(weights[key.removeprefix("model.")], name=key)
        return graph, onnx

    return lowered


def beside(name: str) -> ModuleType:
    """Import a file of this folder, which is no package."""
    if name not in sys.modules:
        spec = spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU that is none, under both of TensorRT's libraries: see standin_cuda.py, standin_tensorrt.py."""
    made = beside("standin_cuda").Machine()
    bindings, cuda = ModuleType("cuda.bindings"), ModuleType("cuda")
    bindings.runtime, cuda.bindings = made.runtime(), bindings
    modules = {"cuda": cuda, "cuda.bindings": bindings, "cuda.bindings.runtime": bindings.runtime}
    for target in ("tensorrt", "tensorrt-rtx"):
        modules[target.replace("-", "_")] = beside("standin_tensorrt").library(made, target)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


@pytest.fixture(scope="session")
def build_engines() -> Any:
    """``build_engines(bundle, variant, target, ...)`` puts stand-in engines into a bundle."""
    return beside("standin_build").build


@pytest.fixture(scope="module")
def built_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, build_engines: Any) -> Path:
    """A copy of `tiny_bundle` with stand-in engines of fp32 for both libraries; read only."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    for target in ("tensorrt", "tensorrt-rtx"):
        build_engines(folder, "fp32", target)
    return folder


@pytest.fixture(scope="session")
def tiny_gpu_bundle(shared: Path, tiny_checkpoint: Path) -> Path:
    """The bundle of `tiny_checkpoint` in fp16 and trt-int4; read only: copy it to build in it."""
    folder = shared / "tiny_gpu_bundle"
    with made_once(folder) as missing:
        if missing:
            export(tiny_checkpoint, folder, ExportConfig(variants=["fp16", "trt-int4"]))
    return folder


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Reference:
    """`tiny_checkpoint` in torch, with what it said: for all tests that verify its bundles."""
    return Reference.of(tiny_checkpoint)


@pytest.fixture
def one_reference(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the model in torch once, not once a test."""
    monkeypatch.setattr(Reference, "of", lambda path: reference)
    monkeypatch.setattr("janus_export.verify.lack_of_memory", lambda path: None)
    monkeypatch.setattr("janus_export.verify.difference_of_models", lambda bundle, path: None)


class Workshop:
    """A copy of the bundle, to be changed."""

    def __init__(self, folder: Path, variant: str = "fp32") -> None:
        self.folder, self.variant = folder, variant

    def note(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the manifest."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        change(manifest)
        write_manifest(self.folder, manifest)

    def graph(self, name: str, change: Change) -> None:
        """Change a graph, and its hash with it, as if it had been exported so."""
        bundle = load_bundle(self.folder, check_graphs=False)
        path = bundle.path(name, self.variant)
        model = ir.load(path)
        change(model)
        ir.save(model, path)

        def rehash(manifest: dict[str, Any]) -> None:
            manifest["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest["bytes"][path.name] = path.stat().st_size

        self.note(rehash)

    def shift(self, graph: str, weight: str, by: float) -> None:
        """Add noise of that size to the first weight of a graph whose name ends so."""
        self.graph(graph, shifted(weight, by))

    def scale(self, graph: str, by: float) -> None:
        """Multiply what a graph gives last."""
        self.graph(graph, scaled(by))

    def claim(self, **what: Any) -> None:
        """Let the variant say that it is rounded, in some way."""
        self.note(lambda manifest: manifest["variants"]["fp32"].update(what))

    def verify(self, *gates: str) -> Report:
        [report] = verify(self.folder, "the model", variants=[self.variant], gates=gates)
        return report


def shifted(name: str, by: float) -> Change:
    """Add noise of that size to the first weight whose name ends so."""

    def change(model: ir.Model) -> None:
        values = model.graph.initializers
        [value, *_] = [value for key, value in values.items() if key.endswith(name)]
        weight = value.const_value.numpy()
        noise = np.random.default_rng(0).normal(0, by, weight.shape).astype(weight.dtype)
        value.const_value = ir.Tensor(weight + noise, name=value.name)

    return change


def scaled(by: float) -> Change:
    """Multiply what a graph gives last; of pixels before they become integers."""

    def change(model: ir.Model) -> None:
        value = model.graph.outputs[-1]
        if value.name == MAGNITUDE:
            value = model.graph.outputs[0].producer().inputs[0]
        users = [(node, place) for node, place in value.uses()]
        factor = ir.node("Constant", [], {"value": ir.tensor(np.array(by, value.dtype.numpy()))})
        product = ir.node("Mul", [value, factor.outputs[0]])
        product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
        if users:
            model.graph.insert_after(value.producer(), [factor, product])
            for node, place in users:
                node.replace_input_with(place, product.outputs[0])
        else:
            value.name, product.outputs[0].name = "inner", value.name
            model.graph.extend([factor, product])
            model.graph.outputs[-1] = product.outputs[0]

    return change


@pytest.fixture
def workshop(tiny_bundle: Path, tmp_path: Path) -> Workshop:
    """fp32 alone, whatever else the bundle has."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    copy = Workshop(folder)

    def only(manifest: dict[str, Any]) -> None:
        manifest["variants"] = {"fp32": manifest["variants"]["fp32"]}

    copy.note(only)
    return copy


@pytest.fixture
def workshop_of(tmp_path: Path) -> Callable[[Path, str], Workshop]:
    """Copy any bundle, to change one of its variants."""
    return lambda bundle, variant: Workshop(shutil.copytree(bundle, tmp_path / "copy"), variant)


def draw_codes(janus: Janus, **settings: Any) -> tuple[np.ndarray, list[Image.Image]]:
    """Draw two images of two prompts; return their codes, (N, P) or (N, P, S), and the images."""
    drawings = janus.draw(["a", "a longer prompt"], 2, **settings)
    assert drawings.encoded is not None
    return np.stack(drawings.encoded), drawings


@pytest.fixture(scope="session")
def codes_of() -> Callable[..., tuple[np.ndarray, list[Image.Image]]]:
    """``codes_of(janus, **settings)`` draws; see `draw_codes`."""
    return draw_codes


@pytest.fixture(scope="session")
def filled_once() -> Callable[[Path, Callable[[Path], object]], Path]:
    """Return a function: a folder that ``write`` filled once for all workers, read-only."""

    def once(folder: Path, write: Callable[[Path], object]) -> Path:
        with made_once(folder) as missing:
            if missing:
                write(folder)
        return folder

    return once
