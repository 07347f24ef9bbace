"""Stores the weights of float32 graphs in float16.

A Cast converts a weight to float32; ONNX Runtime folds it when it loads the graph, so steps run in float32.
Rows of a table are converted after the lookup, so that a session never holds the table in float32.
"""

from __future__ import annotations

import onnx_ir as ir

from janus_export.onnx_export.weights import pointers, unbound

UPCAST = ".float32"


def store_as_half(graph: ir.Model, weight_sets: dict[str, str]) -> None:
    """Replace a graph's float32 weights by float16 ones; ``weight_sets`` maps their sets of weights."""
    for value, (weight_set, stored) in pointers(graph):
        to = weight_sets.get(weight_set, weight_set)
        if value.dtype != ir.DataType.FLOAT:
            value.const_value = unbound(to, stored, value.dtype, value.shape, value.name)
            continue
        value.dtype = ir.DataType.FLOAT16
        value.const_value = unbound(to, stored, value.dtype, value.shape, value.name)
        lookups = [use.node for use in value.uses() if use.node.op_type == "Gather" and use.idx == 0]
        for node in lookups:
            _upcast_rows(graph, node)
        direct = [use for use in value.uses() if use.node not in lookups]
        if direct:
            upcast = _cast(value, f"{value.name}{UPCAST}")
            first = next((node for node in graph.graph if any(node is use.node for use in direct)), None)
            # If only a nested graph uses the value, the conversion is the first node.
            graph.graph.insert_before(first or graph.graph[0], upcast)
            for use in direct:
                use.node.replace_input_with(use.idx, upcast.outputs[0])


def _upcast_rows(graph: ir.Model, node: ir.Node) -> None:
    """Convert the output of a Gather to float32."""
    rows = node.outputs[0]
    upcast = _cast(rows, None)
    graph.graph.insert_after(node, upcast)
    ir.convenience.replace_all_uses_with(rows, upcast.outputs[0], replace_graph_outputs=True)
    upcast.replace_input_with(0, rows)
    upcast.outputs[0].name, rows.name = rows.name, f"{rows.name}.float16"
    rows.dtype = ir.DataType.FLOAT16


def _cast(value: ir.Value, name: str | None) -> ir.Node:
    upcast = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape)
    return ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT)}, outputs=[upcast])
