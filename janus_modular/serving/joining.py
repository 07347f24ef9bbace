"""Joins calls of one graph along its images or rows, and divides the results.

A tensor of n images may have k vectors for each (``rows`` under guidance, ``3*images``). They lie in k
blocks: vector b * n + i is the b-th of image i. The first time, `GraphRunner` compares joined calls with
calls alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from janus_modular.graph_specs import GraphSignature, TensorSpec, factor_and_axis
from janus_modular.protocols import SharedSession
from janus_modular.serving.row_view import Indices, RunCall, SharedTensor, Vectors, gather, own_tensor

NUMBERS = (np.ndarray, np.generic, int, float)
"""The types of scalar inputs."""


class JoinableGraph:
    """A graph whose tensors are scalars, or have images or rows along their first axis alone."""

    def __init__(self, name: str, signature: GraphSignature) -> None:
        """Prepare to join calls; `is_joinable` says whether the graph's tensors allow it."""
        tensors = (*signature.inputs, *signature.outputs)
        self.name, self.signature = name, signature
        self.is_joinable = all(_is_divisible(spec) for spec in tensors)
        self.leading = [
            factor_and_axis(str(spec.shape[0])) if spec.shape else (0, "") for spec in signature.inputs
        ]

    def joinable(self, call: RunCall) -> Joinable | None:
        """Return how a call can be joined with others; None if it cannot: alone, it raises what it must."""
        if len(call.inputs) != len(self.leading):
            return None
        lengths, scalars = dict[str, int](), list[Any]()
        for (factor, axis), spec, value in zip(self.leading, self.signature.inputs, call.inputs, strict=True):
            if not axis:
                if not isinstance(value, NUMBERS) or np.ndim(value):
                    return None
                scalars.append(float(value))
                continue
            shape = tuple(getattr(value, "shape", ()))
            if shape[1:] != spec.shape[1:] or shape[0] % factor:
                return None
            if lengths.setdefault(axis, shape[0] // factor) != shape[0] // factor:
                return None
        count = lengths.get("images", lengths.get("rows", 0))
        if not count or lengths.get("rows", count) % count:
            return None
        return Joinable(
            call, self.signature, count, (self.name, lengths.get("rows", count) // count, *scalars)
        )


@dataclass(frozen=True, slots=True)
class Joinable:
    """A call that can be joined with others of the same ``key``."""

    call: RunCall
    signature: GraphSignature
    count: int  # images, or rows of a graph without images
    key: tuple[Any, ...]  # the graph, its rows per image, and its scalar inputs


def _is_divisible(spec: TensorSpec) -> bool:
    """Return True for a scalar, and for images or rows whose other axes are fixed."""
    if not spec.shape:
        return True
    leading, *rest = spec.shape
    is_axis = isinstance(leading, str) and factor_and_axis(leading)[1] in ("images", "rows")
    return is_axis and all(isinstance(size, int) for size in rest)


def run_joined(session: SharedSession, calls: Sequence[Joinable]) -> list[Any]:
    """Run calls of the same key at once; return the result of each."""
    first, counts = calls[0], tuple(call.count for call in calls)
    inputs = [
        first.call.inputs[position]
        if not spec.shape
        else _concatenate(session, spec, [call.call.inputs[position] for call in calls], counts)
        for position, spec in enumerate(first.signature.inputs)
    ]
    outputs = session.run(first.call.name, *inputs)
    return divide(session, first.signature, outputs, counts)


def divide(
    session: SharedSession, signature: GraphSignature, outputs: Any, counts: tuple[int, ...]
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
    session: SharedSession, spec: TensorSpec, values: Sequence[Any], counts: tuple[int, ...]
) -> Any:
    """Return the inputs of several calls as one tensor: block by block, and in each the calls' vectors."""
    blocks = values[0].shape[0] // counts[0]
    is_float = spec.dtype not in ("int64", "uint8", "bool")
    if is_float and len(spec.shape) == 2 and not all(isinstance(value, np.ndarray) for value in values):
        return gather(session, values, None if len(counts) == 1 else _order(counts, blocks))
    arrays = [
        value if isinstance(value, np.ndarray) else session.to_host(own_tensor(session, value))
        for value in values
    ]
    if len(arrays) == 1:
        return arrays[0]
    joined = np.concatenate(arrays)
    return joined[_order(counts, blocks)] if blocks > 1 else joined


@lru_cache(maxsize=1024)
def _positions(counts: tuple[int, ...], blocks: int) -> list[Indices]:
    """Return for each call where its vectors lie among those of all calls."""
    starts, total = np.cumsum([0, *counts[:-1]]), sum(counts)
    return [
        (np.arange(blocks)[:, None] * total + start + np.arange(count)).reshape(-1)
        for start, count in zip(starts.tolist(), counts, strict=True)
    ]


@lru_cache(maxsize=1024)
def _order(counts: tuple[int, ...], blocks: int) -> Indices:
    """Return the order of the calls' vectors, one call after the other, among those of all calls."""
    return np.argsort(np.concatenate(_positions(counts, blocks)))
