"""How modules become standard ONNX where torch's own translation is not what runtimes want."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset23

op: Any = opset23  # its stubs know no values of a graph under construction


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Lower ``x @ weight.T + bias`` for x (..., K) and weight (N, K) to one Gemm on rows.

    The weight stays as it lies on disk. Left to itself a 3-D input gives Transpose and MatMul, which a
    runtime folds at load into a second copy of the weight.
    """
    rank, outputs = len(x.shape), weight.shape[0]
    if len(weight.shape) != 2:
        raise NotImplementedError(f"a linear layer whose weight has {len(weight.shape)} dimensions")
    rows = x if rank == 2 else op.Flatten(x, axis=-1)
    y = op.Gemm(rows, weight, bias, transB=1) if bias is not None else op.Gemm(rows, weight, transB=1)
    if rank == 2:
        return y
    lengths = [length if isinstance(length, int) else -1 for length in x.shape[:-1]]
    if lengths.count(-1) > 1:  # one unknown length a Reshape can work out; more have to be looked up
        return op.Reshape(
            y, op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[outputs]), axis=0)
        )
    return op.Reshape(y, op.Constant(value_ints=[*lengths, outputs]))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.linear.default: linear}
"""What replaces torch's own translations."""


def share_shapes(model: ir.Model) -> None:
    """Read each shape once: values whose axes have the same names have the same shape.

    Every linear layer asks for the shape of its input; in a decoder they are all one and the same.
    """
    seen: dict[tuple[Any, ...], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Shape" or node.inputs[0] is None or (shape := node.inputs[0].shape) is None:
            continue
        start, end = (
            node.attributes[key].as_int() if key in node.attributes else default
            for key, default in (("start", 0), ("end", len(shape)))
        )
        lengths = [d if isinstance(d, int) else d.value for d in list(shape)[start:end]]
        if not lengths or None in lengths:
            continue
        first = seen.setdefault(tuple(lengths), node.outputs[0])
        if first is not node.outputs[0]:
            ir.convenience.replace_all_uses_with(node.outputs[0], first)
