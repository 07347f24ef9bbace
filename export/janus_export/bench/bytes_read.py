"""The bytes that a step has to read, and how fast memory is read.

A step reads the weights that it multiplies by, and the keys and values that it sees. Tables that are only
looked up (embeddings) are not counted: a step reads one row of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from janus_export.bundle.bundle import Bundle
from janus_export.bundle.external_data import operators, references
from janus_export.runtimes.contract import BundleRuntime
from janus_modular import Runtime
from janus_modular.protocols import ModelRuntime

LOOKUPS = {"Gather", "GatherBlockQuantized"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

MEASURED_BYTES = 1 << 30
"""Bytes that are read for one measurement: several times what the largest caches hold."""


def weights_read(runtime: Runtime, graph: str, step: Callable[[], Any]) -> int | None:
    """Return the bytes of weights that one step reads, as they are stored; None if unknown.

    For a bundle, the sizes come from the graphs of the backbone and of ``graph``; for a model in torch, from
    the modules that are called in a ``step``.
    """
    if isinstance(runtime, BundleRuntime):
        return sum(multiplied(runtime.bundle, name, runtime.variant) for name in ("backbone", graph))
    return watched(step) if isinstance(runtime, ModelRuntime) else None


def cache_read(runtime: Runtime, positions: float) -> int | None:
    """Return the bytes of the cache that a step reads of one row that has so many positions."""
    if isinstance(runtime, BundleRuntime):
        contract = runtime.bundle.contract("backbone", runtime.variant)
        pasts = {past for _, past in (*contract["aliases"], *contract.get("states", ()))}
        tensors = [
            (tensor["shape"], BYTES[tensor["dtype"]])
            for tensor in contract["inputs"]
            if tensor["name"] in pasts
        ]
    elif isinstance(runtime, ModelRuntime):
        from janus_export.onnx_export.kv_cache import cache_tensors

        backbone: Any = runtime.model.backbone
        size = next(backbone.parameters()).element_size()
        tensors = [
            (tensor.shape, size if tensor.dtype == "model" else BYTES[tensor.dtype])
            for tensor in cache_tensors(backbone)
        ]
    else:
        return None
    return int(
        sum(
            size
            * prod(length for length in shape if isinstance(length, int))
            * (positions if "capacity" in shape else 1)
            for shape, size in tensors
        )
    )


def multiplied(bundle: Bundle, graph: str, variant: str) -> int:
    """Return the bytes of a graph's weights that are multiplied, not only looked up."""
    return read_by(bundle.path(graph, variant))


def read_by(path: Path) -> int:
    """Return the bytes that a graph's nodes read of other files, tables that are looked up left out.

    Weights that a Cast converts to float32 at load are counted in float32.
    """
    operators_of = operators(path)
    read = 0
    for reference in references(path):
        users = operators_of.get(reference.tensor, set())
        if not users or not users <= LOOKUPS:
            read += (reference.length or 0) * (2 if users == {"Cast"} else 1)
    return read


def watched(step: Callable[[], Any]) -> int:
    """Make a step in torch; return the bytes of the parameters of every module that was called in it."""
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    weights: dict[int, int] = {}

    def note(module: torch.nn.Module, _: Any) -> None:
        if not isinstance(module, torch.nn.Embedding):
            weights.update(
                (id(parameter), parameter.nbytes) for parameter in module.parameters(recurse=False)
            )

    handle = register_module_forward_pre_hook(note)
    try:
        step()
    finally:
        handle.remove()
    return sum(weights.values())


def cores() -> int:
    """Count the cores that this process may use: the default number of threads of runtimes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(threads: int, *, passes: int = 3) -> float:
    """Measure how many bytes a second ``threads`` threads read from memory together.

    Each takes the maximum of a slice of one array, which numpy does in vector registers and without
    Python's lock: of the reductions that were tried, none reads faster. The best of several passes counts.
    """
    array = np.full(MEASURED_BYTES // 4, 1, np.uint32)  # written once, so that every page is allocated
    slices = np.array_split(array, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(1 + passes):  # the first one starts the threads
            start = time.perf_counter()
            list(pool.map(np.max, slices))
            seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds[1:])
