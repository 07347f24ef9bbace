"""Linear layers whose weights are rounded: how graphs take them.

Two forms: ONNX Runtime's MatMulNBits, which multiplies packed weights as they lie, and the standard
DequantizeLinear in blocks, which TensorRT fuses. Weights are in a graph's own order, (N, K): that is also
the order of both forms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from janus_export.rounding import Rounding, codes_of, pack, scales_of
from janus_export.storage import Stored
from janus_export.weights import Source, stored_name, unbound

CODES, SCALES = ".codes", ".scales"
CONTRIB = "com.microsoft"


@dataclass
class Outcome:
    """What became of a graph's weights, so that none stays as it was unnoticed."""

    rounded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)  # weight -> why


def quantize(graph: ir.Model, rounding: Rounding) -> Outcome:
    """Let the linear layers of a lowered graph take rounded weights; report on every weight matrix."""
    outcome = Outcome()
    for node in list(graph.graph):
        for place, value in enumerate(node.inputs):
            name = None if value is None else stored_name(value)
            if value is None or name is None or len(value.shape or ()) < 2:
                continue
            reason = _reason(node, place, value, rounding)
            if reason:
                outcome.kept[name] = reason
            else:
                FORMS[rounding.form](graph, node, name, rounding)
                outcome.rounded.append(name)
    passes.RemoveUnusedNodesPass()(graph)
    outcome.rounded = sorted(set(outcome.rounded))
    return outcome


def stored(names: Sequence[str], source: Source, rounding: Rounding, scale: Any) -> list[Stored]:
    """Say how to write codes and scales (of numpy dtype ``scale``) by their names, piece by piece."""
    found = []
    for name in sorted(names):
        weight, _, what = name.rpartition(".")
        rows, width = source.shapes[weight]
        blocks = -(-width // rounding.block_size)
        pieces: Callable[[], Iterator[Any]] = partial(_pieces, source, weight, rounding, what, scale)
        if what == "codes":
            shape = (rows, blocks, rounding.block_size * rounding.bits // 8)
            found.append(Stored(name, "U8", shape, pieces))
        else:
            found.append(Stored(name, "F16" if scale == np.float16 else "F32", (rows, blocks), pieces))
    return found


def _pieces(source: Source, weight: str, rounding: Rounding, what: str, scale: Any) -> Iterator[Any]:
    for rows in source.rows(weight):
        scales = scales_of(rows, rounding).astype(scale)
        if what == "codes":  # rounded by the scales as they are stored
            yield pack(codes_of(rows, scales.astype(np.float32), rounding), rounding)
        else:
            yield scales


def _reason(node: ir.Node, place: int, value: ir.Value, rounding: Rounding) -> str:
    """Say why a weight stays as it is; nothing where it is a linear layer's that can be rounded."""
    if node.op_type != "Gemm" or place != 1:
        return f"used by {node.op_type}, which is no linear layer"
    width = value.shape[1] if value.shape is not None else 0
    if rounding.form == "qdq" and (not isinstance(width, int) or width % rounding.block_size):
        return f"its {width} columns are no multiple of the block size, {rounding.block_size}"
    return ""


def _weight(
    graph: ir.Model, rounding: Rounding, name: str, dtype: ir.DataType, shape: Sequence[int]
) -> ir.Value:
    """Return an initialiser that is bound later; one for all that use it."""
    if name not in graph.graph.initializers:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = unbound(rounding.kind, name, dtype, ir.Shape(shape), name)
        graph.graph.register_initializer(value)
    return graph.graph.initializers[name]


def _sizes(weight: ir.Value, rounding: Rounding) -> tuple[int, int, int]:
    assert weight.shape is not None
    rows, width = weight.shape.numpy()
    return rows, width, -(-width // rounding.block_size)


def _as_nbits(graph: ir.Model, node: ir.Node, name: str, rounding: Rounding) -> None:
    """Replace Gemm, and the Flatten and Reshape around it, by MatMulNBits, which takes any rank."""
    rows, width, blocks = _sizes(node.inputs[1], rounding)  # type: ignore[arg-type]  # it has a weight
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = node.inputs[1].dtype or ir.DataType.FLOAT  # type: ignore[union-attr]
    packed = (rows, blocks, rounding.block_size * rounding.bits // 8)
    flatten, users = x.producer(), list(y.consumers())
    if flatten is not None and flatten.op_type == "Flatten" and [u.op_type for u in users] == ["Reshape"]:
        x, y = flatten.inputs[0], users[0].outputs[0]
    product = ir.node(
        "MatMulNBits",
        [
            x,
            _weight(graph, rounding, name + CODES, ir.DataType.UINT8, packed),
            _weight(graph, rounding, name + SCALES, dtype, (rows, blocks)),
            *([None, None, bias] if bias is not None else []),
        ],
        attributes={
            "K": width,
            "N": rows,
            "bits": rounding.bits,
            "block_size": rounding.block_size,
            "accuracy_level": rounding.accuracy_level,
        },
        domain=CONTRIB,
        version=1,
        outputs=[ir.Value(name=y.name, type=y.type, shape=y.shape)],
    )
    graph.graph.opset_imports[CONTRIB] = 1
    _replace(graph, node, y, product)
    if users and users[0].outputs[0] is y:
        graph.graph.remove(users[0], safe=True)
    graph.graph.remove(node, safe=True)
    if flatten is not None and not flatten.outputs[0].uses():
        graph.graph.remove(flatten, safe=True)


def _as_qdq(graph: ir.Model, node: ir.Node, name: str, rounding: Rounding) -> None:
    """Put a DequantizeLinear in blocks between a Gemm and its weight."""
    weight = node.inputs[1]
    assert weight is not None
    rows, width, blocks = _sizes(weight, rounding)
    dtype = weight.dtype or ir.DataType.FLOAT
    codes = ir.DataType.INT4 if rounding.bits == 4 else ir.DataType.INT8
    restored = ir.node(
        "DequantizeLinear",
        [
            _weight(graph, rounding, name + CODES, codes, (rows, width)),
            _weight(graph, rounding, name + SCALES, dtype, (rows, blocks)),
        ],
        attributes={"axis": 1, "block_size": rounding.block_size},
        outputs=[ir.Value(name=f"{name}.restored", type=weight.type, shape=weight.shape)],
    )
    graph.graph.insert_before(node, restored)
    node.replace_input_with(1, restored.outputs[0])


def _replace(graph: ir.Model, before: ir.Node, old: ir.Value, new: ir.Node) -> None:
    graph.graph.insert_before(before, new)
    ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)


FORMS = {"nbits": _as_nbits, "qdq": _as_qdq}
