"""Quantised weights: sizes, errors, and products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file

from janus_export.bundle.bundle import Bundle, load_bundle
from janus_export.onnx_export.half_storage import store_as_half
from janus_export.onnx_export.quantization import QuantizationSpec, codes_of, pack, scales_of, unpack
from janus_export.onnx_export.quantize import CODES, ROWS, SCALES, Outcome, quantize
from janus_export.onnx_export.weights import pointers, stored_name, unbound

FORMS = [("nbits", 4), ("nbits", 8), ("qdq", 4)]


def quantization(form: str, bits: int, block_size: int = 32, **options: Any) -> QuantizationSpec:
    return QuantizationSpec("trial", bits, block_size, form, **options)


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_no_weight_moves_by_more_than_half_a_step_but_where_the_range_ends(form: str, bits: int):
    weight = np.random.default_rng(0).standard_normal((24, 160)).astype(np.float32)
    how = quantization(form, bits)
    scales = scales_of(weight, how)
    packed = pack(codes_of(weight, scales, how), how)
    assert packed.nbytes == weight.size * bits // 8
    restored = unpack(packed, scales, how)
    step = np.abs(scales).repeat(32, axis=1)
    # The side away from a block's largest weight has one code less, so it may be cut by a whole step.
    assert np.all(np.abs(restored - weight) <= step * 1.0001)
    assert np.mean(np.abs(restored - weight) <= step * 0.5001) > 0.98
    largest = np.abs(weight.reshape(24, 5, 32)).argmax(-1)[..., None]
    np.testing.assert_allclose(
        np.take_along_axis(restored.reshape(24, 5, 32), largest, -1),
        np.take_along_axis(weight.reshape(24, 5, 32), largest, -1),
        rtol=1e-6,
    )


def test_blocks_of_zeros_stay_zeros_and_short_rows_are_filled_up():
    weight = np.zeros((3, 40), np.float32)
    weight[1, 39] = -2.0
    how = quantization("nbits", 4)
    scales = scales_of(weight, how)
    restored = unpack(pack(codes_of(weight, scales, how), how), scales, how)
    assert scales.shape == (3, 2)
    np.testing.assert_array_equal(restored[:, :40], weight)
    assert not restored[:, 40:].any()


def linear_graph(weight: np.ndarray, bias: bool, rank: int) -> ir.Model:
    """A linear layer as lowering writes it, its weight detached."""
    rows, width = weight.shape
    lengths: list[Any] = ["R", "T"][: rank - 1]
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    inputs = ["flat" if rank == 3 else "x", "weight", *(["bias"] if bias else [])]
    nodes = [helper.make_node("Gemm", inputs, ["rows" if rank == 3 else "y"], transB=1)]
    if rank == 3:
        nodes.insert(0, helper.make_node("Flatten", ["x"], ["flat"], axis=-1))
        nodes += [
            helper.make_node("Shape", ["x"], ["lengths"], start=0, end=-1),
            helper.make_node("Concat", ["lengths", "width"], ["shape"], axis=0),
            helper.make_node("Reshape", ["rows", "shape"], ["y"]),
        ]
    initializers = [onnx.helper.make_tensor("weight", kind, weight.shape, weight.tobytes(), raw=True)]
    if bias:
        initializers.append(helper.make_tensor("bias", kind, [rows], np.arange(rows, dtype=np.float32)))
    if rank == 3:
        initializers.append(helper.make_tensor("width", onnx.TensorProto.INT64, [1], [rows]))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", kind, [*lengths, width])],
        [helper.make_tensor_value_info("y", kind, [*lengths, rows])],
        initializers,
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    )
    value = model.graph.initializers["weight"]
    value.const_value = ir.ExternalTensor(
        "weights/fp32/weight", None, None, ir.DataType.FLOAT, shape=ir.Shape(weight.shape), name="weight"
    )
    return model


def quantized(model: ir.Model, how: QuantizationSpec) -> Outcome:
    return quantize({"backbone": model}, how, {"backbone": how.bits})


def bind_to_files(model: ir.Model, arrays: dict[str, np.ndarray], folder: Path) -> None:
    """Write each array once, and point every initialiser that stands for it there."""
    for name, array in arrays.items():
        (folder / name).write_bytes(array.tobytes())
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            name = stored_name(value)
            value.const_value = ir.ExternalTensor(
                name, 0, arrays[name].nbytes, value.dtype, shape=value.shape, name=value.name
            )


def table_graph(weight: np.ndarray, head: bool) -> ir.Model:
    """A lookup as lowering writes it, with a tied head on request."""
    rows, width = weight.shape
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Gather", ["weight", "ids"], ["x"])]
    outputs = [helper.make_tensor_value_info("x", kind, ["R", width])]
    if head:
        nodes.append(helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1))
        outputs.append(helper.make_tensor_value_info("y", kind, ["R", rows]))
    ids = [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["R"])]
    held = [helper.make_tensor("weight", kind, weight.shape, weight.tobytes(), raw=True)]
    graph = helper.make_graph(nodes, "table", ids, outputs, held)
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    )
    value = model.graph.initializers["weight"]
    value.const_value = unbound("fp32", "weight", ir.DataType.FLOAT, value.shape, "weight")
    return model


@pytest.mark.parametrize("halves", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_lookup_and_a_tied_head_read_the_same_bytes(bits: int, halves: bool, tmp_path: Path):
    """One copy of codes and scales on disk: rows of it are looked up, and all of it is multiplied."""
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float32)
    how = quantization("nbits", bits, accuracy_level=1)  # float32: what is compared is the weights
    model = table_graph(weight, head=True)
    outcome = quantize({"embed": model}, how, {"embed": bits})
    assert outcome.graphs == {"embed": bits}
    assert outcome.skipped == {}
    scales = scales_of(weight, how)
    if halves:
        store_as_half(model, {})
        scales = scales.astype(np.float16)
    packed = pack(codes_of(weight, scales.astype(np.float32), how), how)
    assert set(model.graph.initializers) == {"weight" + CODES, "weight" + CODES + ROWS, "weight" + SCALES}
    bind_to_files(model, {"weight" + CODES: packed, "weight" + SCALES: scales}, tmp_path)
    ir.save(model, tmp_path / "table.onnx")
    ids = np.array([0, 47, 3, 3])
    x, y = onnxruntime.InferenceSession(str(tmp_path / "table.onnx")).run(None, {"ids": ids})
    restored = unpack(packed, scales, how)
    np.testing.assert_array_equal(x, restored[ids])
    np.testing.assert_allclose(y, restored[ids] @ restored.T, rtol=0, atol=1e-3)  # sums of 64, up to 1e2


def test_rows_of_an_unquantised_table_are_upcast_after_they_were_looked_up(tmp_path: Path):
    """A session that widened the table as a whole would hold it in float32."""
    weight = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float16)
    model = table_graph(weight.astype(np.float32), head=False)
    store_as_half(model, {"fp32": "fp16"})
    assert [node.op_type for node in model.graph] == ["Gather", "Cast"]
    assert [pointer for _, pointer in pointers(model)] == [("fp16", "weight")]
    bind_to_files(model, {"weight": weight}, tmp_path)
    ir.save(model, tmp_path / "table.onnx")
    (x,) = onnxruntime.InferenceSession(str(tmp_path / "table.onnx")).run(None, {"ids": np.array([5, 1])})
    np.testing.assert_array_equal(x, weight[[5, 1]].astype(np.float32))


def test_a_weight_of_two_graphs_has_the_most_bits_that_either_asks_for():
    weight = np.zeros((48, 64), np.float32)
    graphs = {"embed": table_graph(weight, head=False), "sample_text": table_graph(weight, head=True)}
    outcome = quantize(graphs, quantization("nbits", 4), {"embed": 4, "sample_text": 8})
    assert outcome.quantized == {"weight": 8}
    for graph in graphs.values():
        assert all(node.attributes.get_int("bits") == 8 for node in graph.graph)


def test_the_word_table_is_quantised_in_every_graph_that_looks_it_up():
    weight = np.zeros((48, 64), np.float32)
    graphs = {"embed": table_graph(weight, head=False), "sample_text": table_graph(weight, head=True)}
    outcome = quantize(graphs, quantization("nbits", 4), {"embed": 4})
    assert outcome.graphs == {"embed": 4}
    assert [node.op_type for node in graphs["sample_text"].graph] == ["GatherBlockQuantized", "Gemm"]


def test_a_table_stays_as_it_was_where_engines_look_it_up():
    model = table_graph(np.zeros((48, 64), np.float32), head=False)
    outcome = quantize({"embed": model}, quantization("qdq", 4), {"embed": 4})
    assert outcome.skipped == {
        "weight": "looked up by rows, which TensorRT does not support for a quantised table"
    }
    assert list(outcome.without) == ["embed"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_onnx_runtime_multiplies_the_weights_that_unpacking_gives(
    form: str, bits: int, rank: int, bias: bool, tmp_path: Path
):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 160)).astype(np.float32)
    x = rng.standard_normal((2, 3, 160)[3 - rank :]).astype(np.float32)
    how = quantization(form, bits, accuracy_level=1)  # float32: what is compared is the weights
    model = linear_graph(weight, bias, rank)
    assert quantized(model, how).quantized == {"weight": bits}
    scales = scales_of(weight, how)
    packed = pack(codes_of(weight, scales, how), how)
    values = model.graph.initializers
    assert "weight" not in values
    held = {"weight" + CODES: packed, "weight" + SCALES: scales}
    for name, array in held.items():
        shape = values[name].shape
        data = tmp_path / name
        data.write_bytes(array.tobytes())
        values[name].const_value = ir.ExternalTensor(
            name, 0, array.nbytes, values[name].dtype, shape=shape, name=name
        )
    ir.save(model, tmp_path / "linear.onnx")
    onnx.checker.check_model(tmp_path / "linear.onnx")
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "linear.onnx")).run(None, {"x": x})
    expected = x @ unpack(packed, scales, how).T + (np.arange(24, dtype=np.float32) if bias else 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # sums of 160 products in another order


def test_what_is_no_linear_layer_is_kept_and_named():
    model = linear_graph(np.zeros((24, 160), np.float32), bias=False, rank=2)
    (gemm,) = model.graph
    product = ir.node("MatMul", [gemm.inputs[0], gemm.inputs[1]], outputs=[ir.Value(name="z")])
    model.graph.append(product)
    model.graph.outputs.append(product.outputs[0])
    outcome = quantized(model, quantization("nbits", 4))
    assert outcome.quantized == {"weight": 4}
    assert outcome.skipped == {"weight": "used by MatMul, which is no linear layer"}
    assert "weight" in model.graph.initializers


def test_blocks_that_do_not_fit_are_kept_and_named_where_the_form_cannot_fill_up():
    model = linear_graph(np.zeros((24, 40), np.float32), bias=False, rank=2)
    outcome = quantized(model, quantization("qdq", 4))
    assert outcome.quantized == {}
    assert outcome.without == {"backbone": ["its 40 columns are not a multiple of the block size, 32"]}
    assert outcome.skipped == {"weight": "its 40 columns are not a multiple of the block size, 32"}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.mark.parametrize("variant", ["cpu-int8", "cpu-int4"])
def test_every_matrix_of_the_quantised_graphs_is_rounded_or_kept_with_a_reason(
    bundle: Bundle, variant: str, tiny_checkpoint: Path
):
    record = bundle.manifest["variants"][variant]["quantization"]
    checkpoint = load_file(tiny_checkpoint / "model.safetensors")
    matrices = {
        name
        for name, weight in checkpoint.items()
        if name.startswith(("backbone.", "understanding.")) and weight.ndim >= 2
    }
    assert set(record["quantized"]) | set(record["skipped"]) == matrices
    assert {name for name in matrices if name.startswith("backbone.")} <= set(record["quantized"])
    assert all("no linear layer" in why for why in record["skipped"].values())


@pytest.mark.parametrize(("variant", "bits"), [("cpu-int8", 8), ("cpu-int4", 4)])
def test_the_bundle_holds_the_weights_of_the_checkpoint_rounded(
    bundle: Bundle, variant: str, bits: int, tiny_checkpoint: Path
):
    checkpoint = load_file(tiny_checkpoint / "model.safetensors")
    record = bundle.manifest["variants"][variant]
    quantized = {
        name: array for file in record["weights"] for name, array in load_file(bundle.folder / file).items()
    }
    for name in record["quantization"]["quantized"]:
        how = quantization("nbits", record["quantization"]["weight_bits"].get(name, bits))
        restored = unpack(quantized[name + CODES], quantized[name + SCALES], how)
        error = np.abs(restored - checkpoint[name]).max() / np.abs(checkpoint[name]).max()
        # At most one step, of which 2^(bits-1) make the largest; scales are off by up to 2^-11 themselves.
        assert error <= (1 + 2**-10) / 2 ** (how.bits - 1) + 2**-11


@pytest.mark.parametrize(("variant", "least"), [("cpu-int8", 0.997), ("cpu-int4", 0.85)])
def test_the_rounded_backbone_points_where_the_plain_one_does(bundle: Bundle, variant: str, least: float):
    """Random weights this large multiply errors; a cosine near 1 says that no layer is mixed up."""
    plain, quantized = (
        onnxruntime.InferenceSession(str(bundle.path("backbone", one))) for one in ("fp32", variant)
    )
    rng = np.random.default_rng(0)
    rows, tokens, capacity = 2, 5, 8
    positions = np.tile(np.arange(tokens), (rows, 1))
    feed: dict[str, np.ndarray] = {
        "x": rng.standard_normal((rows, tokens, bundle.manifest["model"]["hidden_size"])).astype(np.float32),
        "positions": positions,
        "mask": np.arange(capacity) <= positions[:, None, :, None],
        "write_index": np.zeros(rows, np.int64),
    }
    for one in plain.get_inputs():
        if one.name.startswith("past"):
            feed[one.name] = np.zeros((rows, one.shape[1], capacity, one.shape[3]), np.float32)
    a, b = (session.run(["hidden"], feed)[0].ravel() for session in (plain, quantized))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= least
