"""Every pair of components that fit together, exported: ONNX Runtime computes the same as torch.

A graph holds some of a model's parts. Rows that share those share its trace, which is what takes long, and
each puts its own weights into it: the numbers are those of the row's whole model, always.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from janus_export.bundle.axes import Ranges
from janus_export.onnx_export.export import export
from janus_export.onnx_export.graphs import Graph, declare
from janus_export.onnx_export.trace import faked, to_onnx
from janus_export.verify import verify
from janus_modular import Plugins
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.model.model import JanusModel

Arrays = dict[str, np.ndarray]

CLOSE = 1e-4  # of the largest number: float32 sums in another order
TOKENS, CAPACITY = 40, 48  # longer than the windows of the backbones
LOWERED: dict[tuple[str, ...], ir.Model] = {}  # by a graph's name and its parts


def graph_inputs(model: JanusModel) -> dict[str, Arrays]:
    """Inputs of graphs other than the backbone's, of more rows and images than they are traced with."""
    chance, path, spec = np.random.default_rng(0), model.generation, model.understanding.encoder.pixels
    rows, images = 6, 3
    side = spec.multiple
    size = (spec.height, spec.width) if side is None else (3 * side, 5 * side)
    hidden = chance.standard_normal((rows, model.backbone.hidden_size), np.float32)
    drawn = chance.integers(0, 256, (images, 3, path.height, path.width), np.uint8)
    codes = path.targets(torch.from_numpy(drawn)).numpy()
    one = {"temperature": np.array(0.7, np.float32)}
    return {
        "understand": {"pixels": chance.integers(0, 256, (images, 3, *size), np.uint8)},
        "embed": {"tokens": chance.integers(0, model.backbone.vocab_size, (rows, 5))},
        "sample_text": {
            "hidden": hidden,
            "noise": chance.exponential(size=(rows, model.backbone.vocab_size)).astype(np.float32),
            **one,
            "top_k": np.array(40),
            "top_p": np.array(0.9, np.float32),
        },
        "sample_image": {
            "hidden": hidden,
            "noise": chance.exponential(size=(images, path.sizes["codes"])).astype(np.float32),
            "guidance": np.array(2, np.float32),
            **one,
        },
        "embed_codes": {"codes": codes[:, :3]},
        "decode_image": {"codes": codes},
        "tokenize_image": {"pixels": drawn},
    }


def in_torch(graph: Graph, inputs: Arrays) -> list[np.ndarray]:
    values = [torch.from_numpy(x) for x in inputs.values()]
    single = len(values) if graph.listed is None else graph.listed
    found = graph.module(*values[:single], *([values[single:]] if graph.listed is not None else []))
    return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]


def in_chunks(session: onnxruntime.InferenceSession, graph: Graph, x: np.ndarray) -> np.ndarray:
    """Run the backbone's graph on x (R, T, D) in two chunks; free positions of the cache are large."""
    pasts = [tensor for tensor in graph.inputs if tensor.name.startswith("past_")]
    shapes = [[n if isinstance(n, int) else CAPACITY for n in tensor.shape[1:]] for tensor in pasts]
    cache = {
        tensor.name: np.full((len(x), *shape), 1e4, np.float32)
        for tensor, shape in zip(pasts, shapes, strict=True)
    }
    states = []
    for start, end in ((0, TOKENS - 7), (TOKENS - 7, TOKENS)):
        at = np.tile(np.arange(start, end), (len(x), 1))
        mask = (np.arange(CAPACITY) <= at[:, :, None])[:, None]
        inputs = {"x": x[:, start:end], "positions": at, "mask": mask, "write_index": at[:, 0].copy()}
        hidden, *present = session.run(None, {**inputs, **cache})
        states.append(hidden)
        cache = dict(zip(cache, present, strict=True))
    return np.concatenate(states, axis=1)


def assert_same(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), what
    if wanted.dtype == np.float32:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE * np.abs(wanted).max(), err_msg=what)
    else:  # ids; and pixels, which are cut to whole numbers and may be one apart
        apart = np.abs(found.astype(int) - wanted.astype(int)).max()
        assert apart <= (wanted.dtype == np.uint8), f"{what}: {apart} apart"


@torch.no_grad()
def assert_graphs_are_the_model(row: Any, plugins: Plugins, made_of: Mapping[str, tuple[str, ...]]) -> None:
    model, _ = row.build(plugins)
    model.eval()
    ranges = Ranges.of(context=model.backbone.context, capacity=64)
    inputs = graph_inputs(model)
    graphs = {graph.name: graph for graph in declare(model, ranges)}
    wanted = {name: in_torch(graphs[name], arrays) for name, arrays in inputs.items()}
    x = torch.randn(2, TOKENS, model.backbone.hidden_size, generator=torch.Generator().manual_seed(1))
    states = model.backbone(x, positions=torch.arange(TOKENS).expand(2, -1)).numpy()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    mode = faked(model)  # from here on the model is a shape
    with mode:
        graphs = {graph.name: graph for graph in declare(model, ranges)}
    for name, graph in graphs.items():
        if name not in made_of:
            continue
        key = (name, *(getattr(row, dimension) for dimension in made_of[name]))
        if key not in LOWERED:
            LOWERED[key] = to_onnx(graph, mode)
        for place, value in LOWERED[key].graph.initializers.items():
            if (own := place.removeprefix("model.")) in weights:
                value.const_value = ir.tensor(weights[own], name=place)
        session = onnxruntime.InferenceSession(ir.to_proto(LOWERED[key]).SerializeToString())
        if name == "backbone":
            assert_same(in_chunks(session, graph, x.numpy()), states, name)
            continue
        outputs = session.run(None, inputs[name])
        if graph.is_measured:  # export adds the magnitude of the pixels
            assert np.isfinite(outputs.pop()).all()
        for spec, output, expected in zip(graph.computed, outputs, wanted[name], strict=True):
            assert_same(output, expected, f"{name}: {spec.name}")


@pytest.mark.slow
def test_a_few_are_the_same_as_graphs(one_of_a_few: Any, table: ModuleType, plugins: Plugins):
    """In the graphs that two parts or more share; every family's backbone has tests of its own."""
    shared = {name: table.MADE_OF[name] for name in ("understand", "sample_image")}
    assert_graphs_are_the_model(one_of_a_few, plugins, shared)


@pytest.mark.slow
def test_every_two_parts_are_the_same_as_graphs(
    new_pairs: tuple[Any, list[str]], table: ModuleType, plugins: Plugins
):
    """Every pair of parts that meets in a graph, in one graph."""
    row, graphs = new_pairs
    assert_graphs_are_the_model(row, plugins, {name: table.MADE_OF[name] for name in graphs})


@pytest.mark.proof
def test_every_graph_of_every_row_is_the_same(graph_row: Any, table: ModuleType, plugins: Plugins):
    assert_graphs_are_the_model(graph_row, plugins, table.MADE_OF)


@pytest.mark.slow
def test_a_few_models_become_bundles_that_verify(one_of_a_few: Any, plugins: Plugins, tmp_path: Path):
    """By the real export, and every gate of its proof: answers and drawings too."""
    model, processor = one_of_a_few.build(plugins)
    save(ModelAssembly(model, processor), tmp_path / "model")
    export(tmp_path / "model", tmp_path / "bundle", plugins=plugins)
    [report] = verify(tmp_path / "bundle", tmp_path / "model", layers=False)
    failed = [check for checks in report.checks.values() for check in checks if not check.passed]
    assert not failed
    assert {"graphs", "rows", "cache", "answer", "drawing"} <= report.checks.keys()
