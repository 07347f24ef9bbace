"""Rewrites graphs for quantised weights of linear layers and embedding tables.

Linear layers have two forms: ONNX Runtime's MatMulNBits, which multiplies packed weights, and the standard
blockwise DequantizeLinear, which TensorRT fuses. Lookups have one form, ONNX Runtime's
GatherBlockQuantized, which reads rows of the same bytes, so that a text head and tied token embeddings are
stored once. Weights are in the graphs' order, (N, K), as all three operators expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from janus_export.bundle.files import Stored
from janus_export.onnx_export.quantization import QuantizationSpec, codes_of, pack, scales_of
from janus_export.onnx_export.weights import Source, stored_name, unbound

CODES, SCALES = ".codes", ".scales"
ROWS = ".rows"  # the codes in the shape for lookups: the same bytes, (N, K * bits / 8)
CONTRIB = "com.microsoft"
TABLES = "embed"  # this name stands for the lookups of token embeddings in all graphs


@dataclass
class Outcome:
    """The result for each weight matrix of a variant, quantised or not."""

    quantized: dict[str, int] = field(default_factory=dict)  # weight -> bits
    skipped: dict[str, str] = field(default_factory=dict)  # weight -> reason why it is not quantised
    graphs: dict[str, int] = field(default_factory=dict)  # requested graph with an effect -> fewest bits
    without: dict[str, list[str]] = field(default_factory=dict)  # requested graph without effect -> reasons
    changed: set[str] = field(default_factory=set)  # graphs that take quantised weights


@dataclass(frozen=True)
class _Use:
    """A use of a quantisable weight in a graph."""

    graph: ir.Model
    node: ir.Node
    weight: str


def quantize(
    graphs: Mapping[str, ir.Model],
    quantization: QuantizationSpec,
    bits: Mapping[str, int],
    beside: Mapping[str, ir.Model] | None = None,
) -> Outcome:
    """Rewrite the graphs of a variant for quantised weights; report each weight matrix of those in ``bits``.

    A weight that several graphs use gets the largest number of bits that any of them requires; ``beside``:
    further graphs that count for this, and are not changed.
    """
    beside = beside or {}
    outcome, uses, shared = Outcome(), list[_Use](), dict[str, int]()
    tables = {name for _, name in _lookups(graphs[TABLES])} if TABLES in graphs else set[str]()
    # Requested graph -> its quantised weights, and the reasons why others are not quantised
    weights_of: dict[str, list[str]] = {name: [] for name in bits if name not in beside}
    reasons: dict[str, list[str]] = {name: [] for name in bits}
    for graph_name, graph in (*graphs.items(), *beside.items()):
        for node in graph.graph:
            for index, value in enumerate(node.inputs):
                name = None if value is None else stored_name(value)
                if value is None or name is None or len(value.shape or ()) < 2:
                    continue
                owner = TABLES if node.op_type == "Gather" and name in tables else graph_name
                if owner not in bits:
                    continue
                reason = _reason(node, index, value, quantization)
                if graph_name in beside:
                    shared[name] = max(shared.get(name, 0), 0 if reason else bits[owner])
                elif reason:
                    outcome.skipped[name] = reason
                    reasons[owner].append(reason)
                else:
                    uses.append(_Use(graph, node, name))
                    outcome.changed.add(graph_name)
                    weights_of[owner].append(name)
                    outcome.quantized[name] = max(outcome.quantized.get(name, 0), bits[owner])
    outcome.quantized = {name: max(n, shared.get(name, 0)) for name, n in outcome.quantized.items()}
    for use in uses:
        form = LOOKUP if use.node.op_type == "Gather" else FORMS[quantization.form]
        form(use.graph, use.node, use.weight, replace(quantization, bits=outcome.quantized[use.weight]))
    for graph in graphs.values():
        passes.RemoveUnusedNodesPass()(graph)
    outcome.quantized = dict(sorted(outcome.quantized.items()))
    for owner, names in weights_of.items():
        if names:
            outcome.graphs[owner] = min(outcome.quantized[name] for name in names)
        else:
            outcome.without[owner] = sorted(set(reasons[owner])) or ["it has no weight matrix"]
    return outcome


def stored(
    names: Sequence[str], source: Source, quantizations: Mapping[str, QuantizationSpec], scale: Any
) -> list[Stored]:
    """Return functions that write codes and scales (of numpy dtype ``scale``) by their names, chunk by chunk.

    ``quantizations`` are those of weights, by name.
    """
    tensors = []
    for name in sorted(names):
        weight, _, role = name.rpartition(".")
        quantization = quantizations[weight]
        rows, columns = source.shapes[weight]
        blocks = -(-columns // quantization.block_size)
        chunks: Callable[[], Iterator[Any]] = partial(_chunks, source, weight, quantization, role, scale)
        if role == "codes":
            shape = (rows, blocks, quantization.block_size * quantization.bits // 8)
            tensors.append(Stored(name, "U8", shape, chunks))
        else:
            tensors.append(Stored(name, "F16" if scale == np.float16 else "F32", (rows, blocks), chunks))
    return tensors


def _chunks(
    source: Source, weight: str, quantization: QuantizationSpec, role: str, scale: Any
) -> Iterator[Any]:
    for rows in source.rows(weight):
        with np.errstate(over="ignore"):
            scales = scales_of(rows, quantization).astype(scale)
        if not np.isfinite(scales).all():
            raise source.overflow(torch.float16)
        if role == "codes":  # quantised with the scales as stored
            yield pack(codes_of(rows, scales.astype(np.float32), quantization), quantization)
        else:
            yield scales


def _lookups(graph: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    for node in graph.graph:
        if node.op_type == "Gather" and node.inputs[0] is not None and (name := stored_name(node.inputs[0])):
            yield node, name


def _reason(node: ir.Node, index: int, value: ir.Value, quantization: QuantizationSpec) -> str:
    """Return why a weight cannot be quantised; empty if a linear layer or a lookup supports it."""
    columns = value.shape[1] if value.shape is not None else 0
    fits = isinstance(columns, int) and columns % quantization.block_size == 0
    blocks = f"its {columns} columns are not a multiple of the block size, {quantization.block_size}"
    if node.op_type == "Gather" and index == 0:
        if node.attributes.get_int("axis", 0) != 0 or len(value.shape or ()) != 2:
            return "looked up along another axis than its rows"
        if quantization.form not in LOOKUP_FORMS:
            return "looked up by rows, which TensorRT does not support for a quantised table"
        return "" if fits else blocks
    if node.op_type != "Gemm" or index != 1:
        return f"used by {node.op_type}, which is no linear layer"
    return blocks if quantization.form == "qdq" and not fits else ""


def _weight(
    graph: ir.Model,
    quantization: QuantizationSpec,
    name: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    view: str = "",
) -> ir.Value:
    """Return an initialiser that is bound later to ``name``; one for all that use it in this ``view``."""
    if name + view not in graph.graph.initializers:
        value = ir.Value(name=name + view, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        value.const_value = unbound(quantization.variant, name, dtype, ir.Shape(shape), value.name)
        graph.graph.register_initializer(value)
    return graph.graph.initializers[name + view]


def _sizes(weight: ir.Value, quantization: QuantizationSpec) -> tuple[int, int, int]:
    assert weight.shape is not None
    rows, columns = weight.shape.numpy()
    return rows, columns, -(-columns // quantization.block_size)


def _as_nbits(graph: ir.Model, node: ir.Node, name: str, quantization: QuantizationSpec) -> None:
    """Replace Gemm, and the Flatten and Reshape around it, by MatMulNBits, which takes any rank."""
    rows, columns, blocks = _sizes(node.inputs[1], quantization)  # type: ignore[arg-type]  # it has a weight
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    dtype = node.inputs[1].dtype or ir.DataType.FLOAT  # type: ignore[union-attr]
    packed = (rows, blocks, quantization.block_size * quantization.bits // 8)
    flatten, users = x.producer(), list(y.consumers())
    if flatten is not None and flatten.op_type == "Flatten" and [u.op_type for u in users] == ["Reshape"]:
        x, y = flatten.inputs[0], users[0].outputs[0]
    product = ir.node(
        "MatMulNBits",
        [
            x,
            _weight(graph, quantization, name + CODES, ir.DataType.UINT8, packed),
            _weight(graph, quantization, name + SCALES, dtype, (rows, blocks)),
            *([None, None, bias] if bias is not None else []),
        ],
        attributes={
            "K": columns,
            "N": rows,
            "bits": quantization.bits,
            "block_size": quantization.block_size,
            "accuracy_level": quantization.accuracy_level,
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


def _as_qdq(graph: ir.Model, node: ir.Node, name: str, quantization: QuantizationSpec) -> None:
    """Insert a blockwise DequantizeLinear between a Gemm and its weight."""
    weight = node.inputs[1]
    assert weight is not None
    rows, columns, blocks = _sizes(weight, quantization)
    dtype = weight.dtype or ir.DataType.FLOAT
    codes = ir.DataType.INT4 if quantization.bits == 4 else ir.DataType.INT8
    restored = ir.node(
        "DequantizeLinear",
        [
            _weight(graph, quantization, name + CODES, codes, (rows, columns)),
            _weight(graph, quantization, name + SCALES, dtype, (rows, blocks)),
        ],
        attributes={"axis": 1, "block_size": quantization.block_size},
        outputs=[ir.Value(name=f"{name}.restored", type=weight.type, shape=weight.shape)],
    )
    graph.graph.insert_before(node, restored)
    node.replace_input_with(1, restored.outputs[0])


def _as_lookup(graph: ir.Model, node: ir.Node, name: str, quantization: QuantizationSpec) -> None:
    """Replace Gather by GatherBlockQuantized, which reads rows of the weights of MatMulNBits."""
    table, ids, y = node.inputs[0], node.inputs[1], node.outputs[0]
    assert table is not None
    rows, columns, blocks = _sizes(table, quantization)
    packed = (rows, columns * quantization.bits // 8)
    lookup = ir.node(
        "GatherBlockQuantized",
        [
            _weight(graph, quantization, name + CODES, ir.DataType.UINT8, packed, view=ROWS),
            ids,
            _weight(graph, quantization, name + SCALES, table.dtype or ir.DataType.FLOAT, (rows, blocks)),
        ],
        attributes={
            "bits": quantization.bits,
            "block_size": quantization.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        },
        domain=CONTRIB,
        version=1,
        outputs=[ir.Value(name=y.name, type=y.type, shape=y.shape)],
    )
    graph.graph.opset_imports[CONTRIB] = 1
    _replace(graph, node, y, lookup)
    graph.graph.remove(node, safe=True)


def _replace(graph: ir.Model, before: ir.Node, old: ir.Value, new: ir.Node) -> None:
    graph.graph.insert_before(before, new)
    ir.convenience.replace_all_uses_with(old, new.outputs[0], replace_graph_outputs=True)


FORMS = {"nbits": _as_nbits, "qdq": _as_qdq}
LOOKUP, LOOKUP_FORMS = _as_lookup, ("nbits",)
