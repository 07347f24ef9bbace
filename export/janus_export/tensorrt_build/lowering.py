"""Rewrites a portable graph for TensorRT's parser; results do not change.

Weights stay in the bundle's files: a lowered graph points to them as the portable one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.optimizer import fold_constants

from janus_export.errors import ExportError

MASK = 3  # index of the mask in Attention's inputs


def lower(path: Path, *, capacity: int) -> ir.Model:
    """Open a graph and rewrite it for TensorRT; its caches get ``capacity`` positions.

    Raises:
        ExportError: an input is unused, or an operator is ONNX Runtime's own.
    """
    model = ir.load(path)
    check(model, path.name)
    pin(model, {"capacity": capacity})
    write_out_softcaps(model)
    state_sizes(model)
    fold_constants(model, onnx_shape_inference=False)
    passes.RemoveUnusedNodesPass()(model)
    forget_shapes(model)
    return model


def check(model: ir.Model, name: str) -> None:
    """Raise an error for problems that the parser does not report, or not clearly."""
    unused = [str(i.name) for i in model.graph.inputs if not i.uses() and not i.is_graph_output()]
    if unused:
        raise ExportError(
            f"{name} does not use its input {', '.join(unused)}, so that an engine would lack it."
            " The component ignores an argument: fix the component, and export again."
        )
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in model.graph if node.domain})
    if foreign:
        raise ExportError(f"{name} uses {', '.join(foreign)}, which TensorRT does not support.")


def pin(model: ir.Model, sizes: dict[str, int]) -> None:
    """Fix the lengths of named axes in all shapes of a graph."""
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([sizes.get(str(_name(d)), _name(d)) for d in value.shape])


def state_sizes(model: ir.Model) -> None:
    """Write known sizes into every Reshape, because the parser does not infer computed sizes.

    In ``x.view(rows, tokens, -1, head_dim)``, the number of heads is -1; TensorRT then treats it as unknown,
    which its attention rejects.
    """
    for node in list(model.graph):
        shape = node.outputs[0].shape
        sizes = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] else None
        if shape is None or sizes is None or sizes.op_type != "Concat":
            continue
        counts = [_count(sizes_input) for sizes_input in sizes.inputs]
        if None in counts or sum(map(int, counts)) != len(shape):  # type: ignore[arg-type]  # none is None
            continue
        stated, axis = [], 0
        for sizes_input, count in zip(sizes.inputs, counts, strict=True):
            known = shape[axis] if count == 1 else None
            stated.append(_constant(model, node, [known]) if isinstance(known, int) else sizes_input)
            axis += count or 0
        target = ir.node("Concat", stated, {"axis": 0})
        model.graph.insert_before(node, target)
        node.replace_input_with(1, target.outputs[0])


def _count(sizes_input: ir.Value | None) -> int | None:
    """Return the number of sizes that one input of a shape holds; None if it is unknown."""
    node = sizes_input.producer() if sizes_input is not None else None
    if node is None or sizes_input is None:
        return None
    if node.op_type == "Constant":
        return int(ir.convenience.get_const_tensor(sizes_input).size)  # type: ignore[union-attr]  # it is one
    first = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "Shape" and first is not None:
        start, end = (
            node.attributes.get_int(name, default) for name, default in (("start", 0), ("end", None))
        )
        return len(range(len(first))[start:end])
    if node.op_type in ("Reshape", "Unsqueeze") and first is not None and len(first) == 0:
        return 1
    return None


def write_out_softcaps(model: ir.Model) -> None:
    """Replace attention with capped scores, which TensorRT rejects, by explicit matrix products.

    Query heads that share keys and values go through as more positions of one head, so nothing is
    repeated.
    """
    for node in list(model.graph):
        cap = node.attributes.get_float("softcap", 0.0) if node.op_type == "Attention" else 0.0
        if cap:
            _write_out(model, node, cap)


def forget_shapes(model: ir.Model) -> None:
    """Drop the inferred shapes of intermediate values: they name axes that have fixed lengths now."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None


def _write_out(model: ir.Model, node: ir.Node, cap: float) -> None:
    query, key, value, mask = (*node.inputs, None)[: MASK + 1]
    assert query is not None
    assert query.shape is not None
    assert key is not None
    assert key.shape is not None
    assert value is not None
    assert value.shape is not None
    heads, head_dim, shared, capacity = query.shape[1], query.shape[3], key.shape[1], key.shape[2]
    dtype = query.dtype or ir.DataType.FLOAT
    scale = node.attributes.get_float("scale", head_dim**-0.5)  # type: ignore[operator]  # sizes are numbers

    def add(op: str, inputs: Sequence[ir.Value | None], **attributes: int | Sequence[int]) -> ir.Value:
        new = ir.node(op, inputs, attributes)
        model.graph.insert_before(node, new)
        return new.outputs[0]

    def number(x: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        return _constant(model, node, x, dtype)

    def view(x: ir.Value | None, head: object, last: object) -> ir.Value:
        """Reshape to (rows, head, ..., last)."""
        return add("Reshape", [x, _constant(model, node, [0, head, -1, last])])

    scaled = add("Mul", [query, number(scale, dtype)])  # first, against overflow in half precision
    grouped = view(scaled, shared, head_dim)  # (B, kv heads, groups * T, w)
    scores = add("MatMul", [grouped, add("Transpose", [key], perm=[0, 1, 3, 2])])
    scores = view(add("Cast", [scores], to=int(ir.DataType.FLOAT)), heads, capacity)  # (B, H, T, S)
    capped = add("Mul", [add("Tanh", [add("Div", [scores, number(cap)])]), number(cap)])
    seen = capped if mask is None else add("Where", [mask, capped, number(float("-inf"))])
    weights = add("Cast", [add("Softmax", [seen], axis=-1)], to=int(dtype))
    x = view(add("MatMul", [view(weights, shared, capacity), value]), heads, value.shape[3])
    old = node.outputs[0]
    x.name, x.type, x.shape = old.name, old.type, old.shape
    ir.convenience.replace_all_uses_with(old, x, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _constant(
    model: ir.Model, before: ir.Node, value: object, dtype: ir.DataType = ir.DataType.INT64
) -> ir.Value:
    tensor = ir.tensor(np.array(value, dtype.numpy()))
    node = ir.node("Constant", [], {"value": tensor})
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _name(size: int | ir.SymbolicDim) -> int | str | None:
    return size if isinstance(size, int) else size.value
