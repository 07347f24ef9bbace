"""A second output of the graph that decodes images: how large its values were before they became uint8.

Clipping and casting turn NaN and infinity into ordinary pixels, and a graph cannot raise an error. Therefore
the graph also returns the mean magnitude of each image's values, which is not finite if any value is not;
runtimes check it: `janus_export.bundle.contract.check_magnitude`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

INTEGERS = frozenset(dtype for dtype in ir.DataType if dtype.is_integer()) | {ir.DataType.BOOL}
LIMITING = frozenset({"Clip", "HardSigmoid", "Max", "Min", "Sigmoid", "Softsign", "Tanh"})
"""Operators whose result may be finite where their input is not, and is finite where their input is."""

ELEMENTWISE = LIMITING | {
    "Add", "Cast", "Ceil", "Concat", "Div", "Floor", "Identity", "Mul", "Neg", "Reshape", "Round", "Sub",
    "Transpose",
}  # fmt: skip
"""Operators that may stand between a decoder and its pixels."""


def add_magnitude(model: ir.Model, name: str) -> None:
    """Append the output ``name`` (N,), float32: the mean magnitude of the values behind pixels (N, ...).

    The pixels are the first output. All values that enter an operator of `LIMITING` or are cast to integers
    are measured, from the pixels back to the first operator that does more than shift, scale, clip, cast and
    rearrange; the means are added. The pixels are measured too if none of these values has their first axis,
    or if they come from a lookup.
    """
    pixels = model.graph.outputs[0]
    nodes = list[ir.Node]()

    def add(operator: str, *inputs: ir.Value, **attributes: int | ir.TensorProtocol) -> ir.Value:
        nodes.append(ir.node(operator, list(inputs), attributes))
        nodes[-1].outputs[0].dtype = ir.DataType.INT64 if operator == "Constant" else ir.DataType.FLOAT
        return nodes[-1].outputs[0]

    def mean(value: ir.Value, kept: int) -> ir.Value:
        """Return the mean magnitude over all dimensions but the ``kept`` first."""
        lengths = add("Constant", value=ir.Tensor(np.array([0] * kept + [-1], np.int64)))
        last = add("Constant", value=ir.Tensor(np.array([kept], np.int64)))
        wide = value if value.dtype is ir.DataType.FLOAT else add("Cast", value, to=ir.DataType.FLOAT.value)
        return add("ReduceMean", add("Reshape", add("Abs", wide), lengths), last, keepdims=0)

    measured = list(dict.fromkeys(_limited(pixels)))
    if not any(_first(value) == _first(pixels) for value in measured):
        measured.append(pixels)
    means = [mean(value, int(_first(value) == _first(pixels))) for value in measured]
    total = means[0]
    for term in means[1:]:
        total = add("Add", total, term)
    total.name, total.shape = name, ir.Shape([_first(pixels)])
    model.graph.extend(nodes)
    model.graph.outputs.append(total)


def _limited(value: ir.Value) -> Iterator[ir.Value]:
    """Yield the values that are limited or cast to integers, from ``value`` back to the decoder."""
    node = value.producer()
    if node is None or (node.op_type not in ELEMENTWISE and not _is_integer(value)):
        return
    for each in node.inputs:
        if each is None or _is_constant(each):
            continue
        is_end = node.op_type in LIMITING or _is_integer(value)
        if is_end and not _is_integer(each) and not _is_limited(each):
            yield each
        yield from _limited(each)


def _is_limited(value: ir.Value) -> bool:
    """Return True if a value is the output of a `LIMITING` operator, whose inputs are measured instead."""
    node = value.producer()
    return node is not None and node.op_type in LIMITING


def _is_integer(value: ir.Value) -> bool:
    """Return True if a value holds integers; missing dtypes are inferred from the inputs."""
    node = value.producer()
    if value.dtype is not None or node is None:
        return value.dtype in INTEGERS
    return any(_is_integer(each) for each in node.inputs if each is not None and not _is_constant(each))


def _is_constant(value: ir.Value) -> bool:
    """Return True if a value is the same for all inputs of the graph."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return all(each is None or _is_constant(each) for each in node.inputs)


def _first(value: ir.Value) -> str | None:
    """Return the name of a value's first axis."""
    return str(value.shape[0]) if value.shape else None
