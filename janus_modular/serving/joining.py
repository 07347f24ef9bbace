"""Joins calls of one graph along its images or rows, and divides the results.

A tensor of n images may have k vectors for each (``rows`` under guidance, ``3*images``). They lie in k
blocks: vector b * n + i is the b-th of image i. The first time, `GraphRunner` compares joined calls with
calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from janus_modular.interfaces import GraphSignature, TensorSpec, factor_and_axis
from janus_modular.protocols import SharedSession
from janus_modular.serving.row_view import Indices, RunCall, SharedTensor, Vectors, gather


@dataclass(frozen=True)
class Joinable:
    """A call that can be joined with others of the same ``key``."""

    call: RunCall
    signature: GraphSignature
    count: int  # images, or rows of a graph without images
    key: tuple[Any, ...]  # the graph, vectors per image of each tensor, and its scalar inputs


def joinable(call: RunCall, signature: GraphSignature | None) -> Joinable | None:
    """Return how a call can be joined with others; None if it cannot.

    Each tensor must be a scalar, or have a leading axis of images or rows and otherwise a fixed shape.
    """
    if signature is None or len(signature.inputs) != len(call.inputs):
        return None
    if not all(_is_divisible(spec) for spec in (*signature.inputs, *signature.outputs)):
        return None
    lengths, scalars = dict[str, int](), list[Any]()
    for spec, value in zip(signature.inputs, call.inputs, strict=True):
        shape = tuple(np.shape(value) if np.isscalar(value) else value.shape)
        if len(shape) != len(spec.shape):
            return None
        if not spec.shape:
            if not isinstance(value, np.ndarray | np.generic | int | float):
                return None
            scalars.append(np.asarray(value).item())
            continue
        try:
            lengths |= spec.measure(shape)
        except ValueError:
            return None  # run alone, it raises the session's own error
    count = lengths.get("images", lengths.get("rows", 0))
    if not count or lengths.get("rows", count) % count:
        return None
    return Joinable(call, signature, count, (call.name, lengths.get("rows", count) // count, *scalars))


def _is_divisible(spec: TensorSpec) -> bool:
    """Return True for a scalar, and for images or rows whose other axes are fixed."""
    leading, *rest = spec.shape or (None,)
    if leading is None:
        return True
    is_axis = isinstance(leading, str) and factor_and_axis(leading)[1] in ("images", "rows")
    return is_axis and all(isinstance(size, int) for size in rest)


def run_joined(session: SharedSession, calls: Sequence[Joinable]) -> list[Any]:
    """Run calls of the same key at once; return the result of each."""
    first, counts = calls[0], [call.count for call in calls]
    inputs = [
        first.call.inputs[position]
        if not spec.shape
        else _concatenate(session, spec, [call.call.inputs[position] for call in calls], counts)
        for position, spec in enumerate(first.signature.inputs)
    ]
    outputs = session.run(first.call.name, *inputs)
    return divide(session, first.signature, outputs, counts)


def divide(
    session: SharedSession, signature: GraphSignature, outputs: Any, counts: Sequence[int]
) -> list[Any]:
    """Return the part of each of several calls of what a graph returned for them."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    results: list[list[Any]] = [[] for _ in counts]
    for spec, tensor in zip(signature.outputs, tensors, strict=True):
        positions = _positions(counts, tensor.shape[0] // sum(counts))
        if spec.name == "x" and len(spec.shape) == 2:
            source = SharedTensor(tensor)
            for result, rows in zip(results, positions, strict=True):
                result.append(Vectors(source, rows, tensor.shape[-1]))
        else:
            array = session.to_host(tensor)
            for result, rows in zip(results, positions, strict=True):
                result.append(array if len(counts) == 1 else array[rows])
    return [tuple(result) if isinstance(outputs, tuple) else result[0] for result in results]


def _concatenate(
    session: SharedSession, spec: TensorSpec, values: Sequence[Any], counts: Sequence[int]
) -> Any:
    """Return the inputs of several calls as one tensor: block by block, and in each the calls' vectors."""
    blocks = values[0].shape[0] // counts[0]
    order = np.argsort(np.concatenate(_positions(counts, blocks)))
    if len(spec.shape) == 2 and any(isinstance(value, Vectors) for value in values):
        return gather(session, values, None if len(counts) == 1 else order)
    arrays = [value if isinstance(value, np.ndarray) else session.to_host(value) for value in values]
    return np.concatenate(arrays)[order] if blocks > 1 else np.concatenate(arrays)


def _positions(counts: Sequence[int], blocks: int) -> list[Indices]:
    """Return for each call where its vectors lie among those of all calls."""
    starts, total = np.cumsum([0, *counts[:-1]]), sum(counts)
    return [
        (np.arange(blocks)[:, None] * total + start + np.arange(count)).reshape(-1)
        for start, count in zip(starts.tolist(), counts, strict=True)
    ]
