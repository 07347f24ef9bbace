"""Reads the files and byte ranges that an ONNX graph refers to, and their users, without an ONNX package.

A graph is a protocol buffer: numbered fields, nested. Only the fields that lead to tensors are followed
(numbers as in onnx.proto), everything else is skipped, so a graph of a large model takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from janus_export.bundle.protocol_buffers import fields, messages
from janus_modular.foreign import printable

# message -> its fields that may contain tensors, directly or nested
LEADS = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
NAME, EXTERNAL_DATA, KEY, VALUE = 8, 13, 1, 2  # fields of a tensor, and of an entry of its external data
MOST_DIGITS = 19  # most digits of an offset or a length
GRAPH, NODE, INPUT, OPERATOR = 7, 1, 1, 4  # field numbers of a model, of a graph, of a node


@dataclass(frozen=True)
class Reference:
    """A tensor that is stored outside of its graph."""

    tensor: str
    location: str
    offset: int
    length: int | None


def references(path: Path) -> list[Reference]:
    """List the tensors of a graph that lie in other files.

    Raises:
        ValueError: the file is not a protocol buffer, is truncated, or has an invalid offset or length.
    """
    try:
        return list(_tensors(memoryview(path.read_bytes()), "model"))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no ONNX graph, or is cut short") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def operators(path: Path) -> dict[str, set[str]]:
    """Return the operators that use each tensor of the graph, by tensor name, without subgraphs of nodes.

    Raises:
        ValueError: the file is not a protocol buffer, or is truncated.
    """
    users: dict[str, set[str]] = {}
    try:
        for graph in messages(memoryview(path.read_bytes()), GRAPH):
            for node in messages(graph, NODE):
                (operator,) = messages(node, OPERATOR)
                for name in messages(node, INPUT):
                    users.setdefault(str(name, "utf-8"), set()).add(str(operator, "utf-8"))
    except IndexError as error:
        raise ValueError(f"{path} is no ONNX graph, or is cut short") from error
    return users


def _tensors(message: memoryview, message_type: str) -> Iterator[Reference]:
    leads = LEADS[message_type]
    for number, content in fields(message):
        inner = leads.get(number)
        if inner == "tensor":
            yield from _reference(content)
        elif inner:
            yield from _tensors(content, inner)


def _reference(tensor: memoryview) -> Iterator[Reference]:
    name, entries = "", {}
    for number, content in fields(tensor):
        if number == NAME:
            name = str(content, "utf-8")
        elif number == EXTERNAL_DATA:
            entry = {key: str(value, "utf-8") for key, value in fields(content)}
            entries[entry.get(KEY, "")] = entry.get(VALUE, "")
    if entries:
        offset, length = (_bytes(entries, key, name) for key in ("offset", "length"))
        yield Reference(name, entries.get("location", ""), offset or 0, length)


def _bytes(entries: dict[str, str], key: str, tensor: str) -> int | None:
    text = entries.get(key, "")
    if text and not (text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS):
        raise ValueError(
            f"'{printable(tensor, 120)}' has the {key} '{printable(text, 40)}', expected a number of bytes"
        )
    return int(text) if text else None
