"""The modes of a bundle, and the graphs that each mode needs. Imports neither torch nor ONNX."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

MODES = ("text", "understanding", "drawing")

WORDS = ("embed", "backbone", "sample_text")
"""What answers in words take; `understand` comes to it for images."""

READS = "understand"
SHARED = ("embed", "backbone")
"""What every mode takes. Drawing takes the generation path's graphs too: those that have a role."""


def graphs_of(modes: Container[str], graphs: Sequence[str]) -> tuple[str, ...]:
    """Return those of the ``graphs`` that any of the modes takes, in their order."""
    words = "text" in modes or "understanding" in modes

    def is_taken(name: str) -> bool:
        if name in SHARED:
            return True
        if name in WORDS:
            return words
        return "understanding" in modes if name == READS else "drawing" in modes

    return tuple(filter(is_taken, graphs))


def modes_of(graphs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the modes that these graphs of a manifest are enough for."""
    names = set(graphs)
    has = {
        "text": names.issuperset(WORDS),
        "understanding": names.issuperset((*WORDS, READS)),
        "drawing": names.issuperset(SHARED) and any("role" in record for record in graphs.values()),
    }
    return [mode for mode in MODES if has[mode]]


def mode_of(graph: str) -> str:
    """Return the mode that a graph is for, where it is not for all of them: the one to export it by."""
    return "understanding" if graph == READS else "text" if graph in WORDS else "drawing"
