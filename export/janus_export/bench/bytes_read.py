"""The bytes that a step has to read: the weights that it multiplies by, and the keys and values it sees.

What is looked up rather than multiplied (embedding tables) counts for nothing: a step reads a row of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from janus_export.bundle.bundle import Bundle
from janus_export.bundle.external_data import operators, references
from janus_modular import Runtime

LOOKUPS = {"Gather", "GatherBlockQuantized"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def weights_read(runtime: Runtime, part: str, step: Callable[[], Any]) -> int | None:
    """Return the bytes of weights that one step reads, as they are stored; None where nothing is known.

    A bundle's graphs say it: those of the backbone and of ``part``. A model in torch is watched while it
    makes a ``step``.
    """
    if isinstance(bundle := getattr(runtime, "bundle", None), Bundle):
        variant: str = runtime.variant  # type: ignore[attr-defined]  # what opens bundles has one
        return sum(multiplied(bundle, graph, variant) for graph in ("backbone", part))
    return watched(step) if hasattr(runtime, "model") else None


def cache_read(runtime: Runtime, positions: float) -> int | None:
    """Return the bytes of keys and values that a step reads of one row that has so many positions."""
    if isinstance(bundle := getattr(runtime, "bundle", None), Bundle):
        backbone = bundle.contract("backbone", runtime.variant)  # type: ignore[attr-defined]
        pasts = {past for _, past in backbone["aliases"]}
        each = sum(
            slot["shape"][1] * slot["shape"][3] * BYTES[slot["dtype"]]
            for slot in backbone["inputs"]
            if slot["name"] in pasts
        )
    elif hasattr(runtime, "model"):
        from janus_export.onnx_export.kv_cache import cache_shapes

        backbone = runtime.model.backbone
        size = next(backbone.parameters()).element_size()
        each = size * sum(heads * width for pair in cache_shapes(backbone) for heads, width in pair)
    else:
        return None
    return int(each * positions)


def multiplied(bundle: Bundle, graph: str, variant: str) -> int:
    """Return the bytes of a graph's weights that are more than looked up."""
    return read_by(bundle.path(graph, variant))


def read_by(path: Path) -> int:
    """Return the bytes that a graph's nodes read of other files, tables that are looked up left out.

    What is widened when the graph is loaded (float16 to float32, by a Cast) counts as it is multiplied.
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
