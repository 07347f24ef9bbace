"""Cuts a backbone's graph into subgraphs: before its layers, each layer, and after its layers.

The cuts do not depend on the model family. Between two layers only one value is passed on, the hidden states;
other values that both sides need (masks, rotary tables, lengths) do not depend on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import onnx_ir as ir
from onnx_ir.passes import common as passes

from janus_export.errors import ExportError
from janus_export.onnx_export.weights import PREFIX

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Subgraph:
    """A part of a graph, between two cuts."""

    layer: int | None  # None: before the first layer, or after the last
    model: ir.Model
    takes: str  # the hidden states that go in
    gives: str  # the hidden states that come out
    carries: frozenset[str]  # its outputs that later subgraphs need


def cut(model: ir.Model, layers: str, count: int, *, stream: str, inside: bool = False) -> Iterator[Subgraph]:
    """Cut a graph into subgraphs, to be run in order; each takes what earlier ones gave, by name.

    ``layers`` is the path of the list of ``count`` layers, as weights are named; ``stream`` the input that
    flows through them. ``inside``: subgraphs also return all intermediate values.

    Raises:
        ExportError: more than one value is passed on between two layers.
    """
    passes.ShapeInferencePass()(model)
    graph, nodes = model.graph, list(model.graph)
    flow = _flow(nodes, [value for value in graph.inputs if value.name == stream])
    ends = [0, *_ends(nodes, flow, layers, count), len(nodes)]
    known, takes = set(graph.inputs), stream
    for number, (start, end) in enumerate(pairwise(ends)):
        used = [v for node in nodes[start:end] for v in node.inputs if v is not None and v in known]
        computed = [value for node in nodes[start:end] for value in node.outputs]
        later = {value for node in nodes[end:] for value in node.inputs}
        needed = [value for value in computed if value in later or value.is_graph_output()]
        known |= set(computed)
        if not needed:
            continue
        extra = [value for value in computed if inside and value.dtype in FLOATS and value not in needed]
        part = ir.convenience.extract(graph, list(dict.fromkeys(used)), [*needed, *extra])
        [gives] = [v.name for v in needed if v in flow and v in later] or [graph.outputs[0].name]
        layer = number - 1 if 0 < number <= count else None
        carries = frozenset(str(value.name) for value in needed if value in later or number > count)
        yield Subgraph(layer, ir.Model(part, ir_version=model.ir_version), takes, str(gives), carries)
        takes = str(gives)


def _flow(nodes: Sequence[ir.Node], sources: Sequence[ir.Value]) -> dict[ir.Value, int]:
    """Return the values that the hidden states flow through, and after how many nodes each is there."""
    flow = dict.fromkeys(sources, 0)
    for index, node in enumerate(nodes, 1):
        if node.op_type not in ("Shape", "Size") and any(value in flow for value in node.inputs):
            flow |= {v: index for v in node.outputs if v.dtype is None or v.dtype in FLOATS}
    return flow


def _ends(nodes: Sequence[ir.Node], flow: dict[ir.Value, int], layers: str, count: int) -> list[int]:
    """Return where each layer begins, and where the last one ends: cuts with a single value."""
    used_until = {
        value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None
    }
    change = [0] * (len(nodes) + 1)
    for value, since in flow.items():
        if value in used_until:
            change[since] += 1
            change[used_until[value] + 1] -= 1
    alive = list(accumulate(change))
    first, last, outside = dict[int, int](), {-1: -1}, list[int]()
    for index, node in enumerate(nodes):
        for name in (
            value.name or "" for value in node.inputs if value is not None and value.is_initializer()
        ):
            match = re.match(rf"(?:{re.escape(PREFIX)})?{re.escape(layers)}\.(\d+)\.", name)
            if match:
                first.setdefault(int(match[1]), index)
                last[int(match[1])] = index
            elif name.startswith(PREFIX):
                outside.append(index)
    first[count] = min((index for index in outside if index > last.get(count - 1, index)), default=len(nodes))
    ends = []
    for layer in range(count + 1):
        low, high = last.get(layer - 1), first.get(layer)
        cuts = [] if low is None or high is None else range(low + 1, high + 1)
        single = [index for index in cuts if alive[index] == 1]
        if not single:
            raise ExportError(
                f"the backbone's graph cannot be cut before layer {layer} of {layers}: the layer does"
                " not exist, or has several inputs that change. Verify the whole model: --whole"
            )
        ends.append(single[-1] if layer < count else single[0])  # what is closest to the layers
    return ends
