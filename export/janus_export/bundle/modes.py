"""The modes of a bundle, and the graphs that each mode needs. Imports neither torch nor ONNX."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

MODES = ("text", "understanding", "drawing")

TEXT_GRAPHS = ("embed", "backbone", "sample_text")
"""The graphs for text answers; for input images, `understand` too."""

UNDERSTANDING_GRAPH = "understand"
SHARED_GRAPHS = ("embed", "backbone")
"""The graphs of every mode. Drawing also needs the generation path's graphs: those that have a role."""


def graphs_of(modes: Container[str], graphs: Sequence[str]) -> tuple[str, ...]:
    """Return the ``graphs`` that at least one of the modes needs, in order."""
    words = "text" in modes or "understanding" in modes

    def is_taken(name: str) -> bool:
        if name in SHARED_GRAPHS:
            return True
        if name in TEXT_GRAPHS:
            return words
        return "understanding" in modes if name == UNDERSTANDING_GRAPH else "drawing" in modes

    return tuple(filter(is_taken, graphs))


def modes_of(graphs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the modes that these graphs of a manifest support."""
    names = set(graphs)
    has = {
        "text": names.issuperset(TEXT_GRAPHS),
        "understanding": names.issuperset((*TEXT_GRAPHS, UNDERSTANDING_GRAPH)),
        "drawing": names.issuperset(SHARED_GRAPHS) and any("role" in record for record in graphs.values()),
    }
    return [mode for mode in MODES if has[mode]]


def mode_of(graph: str) -> str:
    """Return the mode that a graph belongs to, for graphs that not all modes need."""
    return "understanding" if graph == UNDERSTANDING_GRAPH else "text" if graph in TEXT_GRAPHS else "drawing"
