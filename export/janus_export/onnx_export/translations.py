"""Translations to standard ONNX that replace torch's own where runtimes need another form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset23
from torch import nn

from janus_export.errors import ExportError
from janus_modular import TranslatesToOnnx

op: Any = opset23  # its type stubs lack symbolic values


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Lower ``x @ weight.T + bias`` for x (..., K) and weight (N, K) to one Gemm on rows.

    The weight keeps its layout on disk. torch's own translation for a 3-D input, Transpose and MatMul, is
    folded by runtimes at load into a second copy of the weight.
    """
    rank, outputs = len(x.shape), weight.shape[0]
    if len(weight.shape) != 2:
        raise NotImplementedError(f"a linear layer whose weight has {len(weight.shape)} dimensions")
    rows = x if rank == 2 else op.Flatten(x, axis=-1)
    y = op.Gemm(rows, weight, bias, transB=1) if bias is not None else op.Gemm(rows, weight, transB=1)
    if rank == 2:
        return y
    lengths = [length if isinstance(length, int) else -1 for length in x.shape[:-1]]
    if lengths.count(-1) > 1:  # a Reshape can infer one unknown length; others are read from the shape
        return op.Reshape(
            y, op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[outputs]), axis=0)
        )
    return op.Reshape(y, op.Constant(value_ints=[*lengths, outputs]))


def split(x: Any, size: int, dim: int = 0) -> list[Any]:
    """Lower a split into chunks of ``size``, the last of which may be smaller."""
    length = x.shape[dim]
    if not (isinstance(length, int) and isinstance(size, int)):
        raise NotImplementedError("a split whose chunks are known only when the graph runs")
    return split_with_sizes(x, [min(size, length - start) for start in range(0, length, size)], dim)


def split_with_sizes(x: Any, sizes: Sequence[Any], dim: int = 0) -> list[Any]:
    """Lower a split into chunks of these sizes to one Slice each.

    torch's own translation is SplitToSequence, and TensorRT does not support sequences. A size may be known
    only when the graph runs, as the number of patches of an image in native size.
    """
    ends = accumulate(sizes, _sum, initial=0)
    return [op.Slice(x, _vector(start), _vector(end), _vector(dim)) for start, end in pairwise(ends)]


def _sum(first: Any, second: Any) -> Any:
    """Return the sum of two lengths, each a number or a value of the graph."""
    if isinstance(first, int) and isinstance(second, int):
        return first + second
    return op.Add(_vector(first), _vector(second))


def _vector(length: Any) -> Any:
    """Return a length, a number or a value of the graph, as a value of shape (1,)."""
    if isinstance(length, int):
        return op.Constant(value_ints=[length])
    return op.Reshape(length, op.Constant(value_ints=[-1]))


Translation = Callable[..., Any]
"""A function that translates an operator of torch, given values of a graph under construction."""

TRANSLATIONS: dict[Callable[..., Any], Translation] = {
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.split.Tensor: split,
    torch.ops.aten.split_with_sizes.default: split_with_sizes,
}
"""The translations that replace torch's own."""


def all_translations(module: nn.Module) -> dict[Callable[..., Any], Translation]:
    """Return `TRANSLATIONS` and the translations that components provide (`janus_modular.TranslatesToOnnx`).

    Raises:
        ExportError: a component translates an operator that has another translation already.
    """
    table, owners = dict(TRANSLATIONS), dict.fromkeys(TRANSLATIONS, "the export itself")
    for path, component in module.named_modules():
        if not isinstance(component, TranslatesToOnnx):
            continue
        owner = f"{path.removeprefix('model.')} ({type(component).__name__})"
        for operator, translation in component.onnx_translations().items():
            if table.setdefault(operator, translation) is not translation:
                raise ExportError(
                    f"{owner} translates the operator {operator} to ONNX, which {owners[operator]} translates"
                    " already, and a graph has one translation of each. Give it an operator of its own"
                    " (torch.library.custom_op), or return the same function object in both."
                )
            owners.setdefault(operator, owner)
    return table


def share_shapes(model: ir.Model) -> None:
    """Read each shape once: values whose axes have the same names have the same shape.

    Every linear layer reads the shape of its input; in a decoder all of these shapes are equal.
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


def cast_explicitly(model: ir.Model) -> None:
    """Turn ``CastLike(x, y)`` into a Cast to the dtype of y, which is known: fewer tools support CastLike."""
    for node in list(model.graph):
        like = node.inputs[1] if node.op_type == "CastLike" else None
        if like is None or like.dtype is None:
            continue
        value = node.outputs[0]
        cast = ir.node("Cast", [node.inputs[0]], {"to": like.dtype.value}, name=node.name)
        cast.outputs[0].dtype, cast.outputs[0].shape = like.dtype, value.shape
        model.graph.insert_before(node, cast)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0], replace_graph_outputs=True)
        name = value.name
        model.graph.remove(node, safe=True)
        cast.outputs[0].name = name


def divide_by_roots(model: ir.Model) -> None:
    """Turn ``x * (1 / sqrt(v))`` into ``x / sqrt(v)``, the form in which ONNX Runtime fuses norms.

    The fusion replaces six operators by one; a decoder step in int4 takes 3 % less time.
    """
    for node in list(model.graph):
        if node.op_type != "Mul":
            continue
        for index, value in enumerate(node.inputs):
            reciprocal = None if value is None else value.producer()
            if reciprocal is None or reciprocal.op_type != "Reciprocal":
                continue
            root = reciprocal.inputs[0]
            if root is None or (maker := root.producer()) is None or maker.op_type != "Sqrt":
                continue
            x, y = node.inputs[1 - index], node.outputs[0]
            quotient = ir.Value(name=y.name, type=y.type, shape=y.shape)
            model.graph.insert_before(node, ir.node("Div", [x, root], outputs=[quotient]))
            ir.convenience.replace_all_uses_with(y, quotient, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            break
