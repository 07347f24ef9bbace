"""One tiny checkpoint and its bundle, exported once for all tests of a run."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from janus_export.axes import Ranges
from janus_export.exporting import export
from janus_export.graphs import Graph, declare
from janus_export.settings import ExportConfig
from janus_export.to_onnx import faked, to_onnx
from janus_modular.checkpoints import save
from janus_modular.compose import compose
from janus_modular.config import load, resolve
from janus_modular.model import JanusModel
from janus_modular.schema import ModelConfig

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


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: Path) -> Path:
    """configs/model/tiny with random weights; read only."""
    folder = shared / "tiny_checkpoint"
    with made_once(folder) as missing:
        if missing:
            torch.manual_seed(0)
            model, processor = compose(resolve(load("model/tiny"), ModelConfig))
            for weight in model.parameters():
                if weight.dim() > 1:  # larger than at the start of a training, so that choices are clear
                    torch.nn.init.normal_(weight, std=0.3)
            save(model, processor, folder)
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
