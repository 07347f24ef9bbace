"""Graphs of a bundle compute the same after processing by common ONNX tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from janus_export.onnx_export.graph_files import constants_as_tensors, save_graph

LENGTHS = {"rows": 2, "tokens": 3, "capacity": 8, "images": 1}
GRAPHS = (
    *("understand", "embed", "backbone", "sample_text"),
    *("sample_image", "embed_codes", "decode_image", "tokenize_image"),
)
# ONNX Runtime's symbolic shape inference takes the standard Attention for its own operator of that name, and
# does not read the axes of reductions other than ReduceSum and ReduceMean: whatever the form of the graph.
UNKNOWN_TO_SYMBOLIC = {"Attention", "ReduceMax", "ReduceL2"}
# Its dynamic quantiser takes Attention for its own operator, too: these are what it should round.
ROUNDED = ["MatMul", "Conv"]  # and Gemm, which it treats as a MatMul
EIGHT_BITS = 0.1  # of the largest number: weights and activations of 8 bits, through two layers


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of its own: onnx refuses files with hard links, which other tests make to the shared one."""
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("tools") / "bundle"))


@pytest.fixture(params=[*GRAPHS, "backbone of cpu-int4"])
def graph(request: pytest.FixtureRequest, bundle: Path) -> Path:
    """The file of a graph."""
    name, _, variant = request.param.partition(" of ")
    variants = json.loads((bundle / "manifest.json").read_text())["variants"]
    return bundle / variants[variant or "fp32"]["files"][name]


def run(path: Path) -> list[Any]:
    """Run a graph on fixed inputs of its shapes."""
    session = onnxruntime.InferenceSession(path, quiet(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    made: dict[str, Callable[[list[int]], Any]] = {
        "tensor(float)": lambda shape: rng.uniform(0.1, 1, shape).astype(np.float32),
        "tensor(uint8)": lambda shape: rng.integers(0, 256, shape, np.uint8),
        "tensor(int64)": lambda shape: rng.integers(1, 5, shape, np.int64),
        "tensor(bool)": lambda shape: np.tril(np.ones(shape[-2:], bool)) & np.ones(shape, bool),
    }
    inputs = {
        one.name: np.asarray(made[one.type]([LENGTHS.get(size, size) for size in one.shape]))
        for one in session.get_inputs()
    }
    if "write_index" in inputs:
        inputs["write_index"][:] = 0
    return session.run(None, inputs)


def quiet() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return options


def assert_same(found: Path, wanted: Path, slack: float = 0.0) -> None:
    """Compare what two graphs compute: numbers within ``slack`` of the largest, ids where that is 0."""
    for one, other in zip(run(found), run(wanted), strict=True):
        if slack and other.dtype == np.int64:
            continue  # a code or a word that is nearly as likely
        apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
        assert apart <= slack * np.abs(other.astype(np.float64)).max()


def test_constants_are_tensors_and_nothing_is_described_twice_or_empty(graph: Path) -> None:
    proto = onnx.load(graph, load_external_data=False).graph
    constants = {one.name for node in proto.node if node.op_type == "Constant" for one in node.attribute}
    assert constants <= {"value"}
    stored = [one.name for one in proto.initializer]
    assert not set(stored) & {one.name for one in proto.value_info}
    assert len(stored) == len(set(stored))
    assert not [one.name for one in proto.initializer if 0 in one.dims]
    assert not {node.op_type for node in proto.node} & {"CastLike", "ScatterElements", "ScatterND"}


def test_onnx_checks_it_and_infers_its_shapes_strictly(graph: Path, tmp_path: Path) -> None:
    onnx.checker.check_model(graph, full_check=True)
    onnx.shape_inference.infer_shapes(onnx.load(graph), check_type=True, strict_mode=True, data_prop=True)


def test_onnx_runtime_infers_its_shapes_and_prepares_it(graph: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    model = onnx.load(graph)
    known = not {node.op_type for node in model.graph.node} & UNKNOWN_TO_SYMBOLIC
    if known:
        inferred = SymbolicShapeInference.infer_shapes(onnx.load(graph))
        onnx.save(inferred, tmp_path / "inferred.onnx")
        assert_same(tmp_path / "inferred.onnx", graph)
    quant_pre_process(model, tmp_path / "prepared.onnx", skip_symbolic_shape=not known)
    assert_same(tmp_path / "prepared.onnx", graph, slack=1e-5)  # operators fused: sums in another order


def test_onnx_runtime_rounds_it_to_8_bits(graph: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from onnxruntime.quantization import quantize_dynamic

    nodes = onnx.load(graph, load_external_data=False).graph.node
    tables, weights = (
        {node.input[place] for node in nodes if node.op_type == operator}
        for operator, place in (("Gather", 0), ("Gemm", 1))
    )
    if tables & weights:
        pytest.skip("ONNX Runtime 1.31 transposes a word table that Gemm and Gather share, for both of them")
    monkeypatch.setattr("logging.warning", lambda *_: None)  # that it was not prepared
    quantize_dynamic(graph, tmp_path / "rounded.onnx", op_types_to_quantize=ROUNDED)
    assert_same(tmp_path / "rounded.onnx", graph, slack=EIGHT_BITS)


@pytest.mark.slow
def test_polygraphy_folds_its_constants(graph: Path, tmp_path: Path) -> None:
    program = shutil.which(
        "polygraphy", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    )
    if program is None:
        pytest.skip("polygraphy and onnx-graphsurgeon are not installed")
    folded = tmp_path / "folded.onnx"
    line = [program, "surgeon", "sanitize", str(graph), "--fold-constants", "-o", str(folded)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    onnx.checker.check_model(folded, full_check=True)
    assert_same(folded, graph)


def test_bare_constants_become_tensors_of_the_dtypes_that_onnx_gives_them(tmp_path: Path) -> None:
    bare = {"value_int": 3, "value_ints": [1, 2], "value_float": 0.5, "value_floats": [0.5, 2.0]}
    nodes = [ir.node("Constant", [], {name: value}) for name, value in bare.items()]
    for node, dtype in zip(nodes, ("INT64", "INT64", "FLOAT", "FLOAT"), strict=True):
        node.outputs[0].dtype = ir.DataType[dtype]
        node.outputs[0].shape = ir.Shape(np.shape(next(iter(node.attributes.values())).value))
    graph = ir.Graph([], [node.outputs[0] for node in nodes], nodes=nodes, name="g", opset_imports={"": 24})
    model = ir.Model(graph, ir_version=10)
    constants_as_tensors(model)
    save_graph(model, tmp_path / "constants.onnx")
    for found, wanted in zip(run(tmp_path / "constants.onnx"), bare.values(), strict=True):
        np.testing.assert_array_equal(found, wanted)
