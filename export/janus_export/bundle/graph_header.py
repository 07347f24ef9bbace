"""The inputs and outputs of an ONNX graph, read from its file without any ONNX package.

Numbers of fields are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from janus_export.bundle.protocol_buffers import integers, messages, texts

GRAPH, NODE, INPUT, OUTPUT = 7, 1, 11, 12  # field numbers of a model; of a graph
NODE_INPUT, NODE_OUTPUT, OPERATOR = 1, 2, 4
NAME, TYPE, TENSOR, ELEMENT, SHAPE, DIMENSION, LENGTH, AXIS = 1, 2, 1, 1, 2, 1, 1, 2  # of a value, nested

ELEMENTS = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
    16: "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """The name, dtype and shape of an input or output."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]  # sizes, and names of axes

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class GraphHeader:
    """Inputs and outputs of a graph, in order, and which outputs are inputs written in place."""

    inputs: tuple[TensorHeader, ...]
    outputs: tuple[TensorHeader, ...]
    aliases: tuple[tuple[str, str], ...]  # (output, input): TensorScatter writes in place


def read_header(path: Path) -> GraphHeader:
    """Read a graph's header.

    Raises:
        ValueError: the file is no protocol buffer, is cut short, or holds no graph.
    """
    try:
        [graph] = messages(memoryview(path.read_bytes()), GRAPH)
        inputs, outputs = (tuple(map(_tensor, messages(graph, side))) for side in (INPUT, OUTPUT))
        return GraphHeader(inputs, outputs, tuple(_aliases(graph, inputs, outputs)))
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path} is no ONNX graph, or is cut short") from error


def _tensor(value: memoryview) -> TensorHeader:
    [name], [value_type] = texts(value, NAME), messages(value, TYPE)
    [tensor] = messages(value_type, TENSOR)
    [element] = integers(tensor, ELEMENT)
    shape = [
        _length(dimension) for outer in messages(tensor, SHAPE) for dimension in messages(outer, DIMENSION)
    ]
    return TensorHeader(name, ELEMENTS.get(element, f"ONNX type {element}"), tuple(shape))


def _length(dimension: memoryview) -> int | str:
    sizes: list[int | str] = [*texts(dimension, AXIS), *integers(dimension, LENGTH)]
    return sizes[0] if sizes else "?"


def _aliases(
    graph: memoryview, inputs: tuple[TensorHeader, ...], outputs: tuple[TensorHeader, ...]
) -> Iterator[tuple[str, str]]:
    input_names, output_names = {tensor.name for tensor in inputs}, {tensor.name for tensor in outputs}
    for node in messages(graph, NODE):
        if texts(node, OPERATOR) == ["TensorScatter"]:
            [past, *_], [present] = texts(node, NODE_INPUT), texts(node, NODE_OUTPUT)
            if past in input_names and present in output_names:
                yield present, past
