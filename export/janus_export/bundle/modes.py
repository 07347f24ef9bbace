"""What a bundle can do, and the graphs that each mode takes. Neither torch nor ONNX is needed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

MODES = ("text", "understanding", "drawing")

WORDS = ("embed", "backbone", "sample_text")
"""What answers in words take; `understand` comes to it for images."""

READS = "understand"
DRAWS = ("embed", "backbone", "sample_image", "decode_image")
"""What a drawing takes at least; a generation path may bring more graphs, which belong to this mode too."""


def graphs_of(modes: Container[str], graphs: Sequence[str]) -> tuple[str, ...]:
    """Return those of the ``graphs`` that any of the modes takes, in their order."""
    words = "text" in modes or "understanding" in modes

    def is_taken(name: str) -> bool:
        if name in ("embed", "backbone"):
            return True
        if name in WORDS:
            return words
        return "understanding" in modes if name == READS else "drawing" in modes

    return tuple(filter(is_taken, graphs))


def modes_of(graphs: Iterable[str]) -> list[str]:
    """Return the modes that these graphs are enough for."""
    names = set(graphs)
    has = {
        "text": names.issuperset(WORDS),
        "understanding": names.issuperset((*WORDS, READS)),
        "drawing": names.issuperset(DRAWS),
    }
    return [mode for mode in MODES if has[mode]]


def mode_of(graph: str) -> str:
    """Return the mode that a graph is for, where it is not for all of them: the one to export it by."""
    return "understanding" if graph == READS else "text" if graph in WORDS else "drawing"
