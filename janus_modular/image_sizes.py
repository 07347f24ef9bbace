"""Sizes of drawn images other than the model's own. Imports no torch.

A size changes how many positions an image takes, and the graphs whose tensors have the size of an image:
those have a name of their own for each size. The weights are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from janus_modular.errors import PromptError
from janus_modular.protocols import Runtime, Session

if TYPE_CHECKING:
    from janus_modular.processing.processor import Processor

SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")


@dataclass(frozen=True)
class ImageSize:
    """A size of drawn images, and what drawing needs to know about it."""

    height: int  # pixels
    width: int
    positions: int  # that an image takes
    sizes: Mapping[str, Any]  # `GenerationPath.sizes`
    graphs: Mapping[str, str]  # from the names that samplers run to those of this size, where they differ


@runtime_checkable
class DrawsSizes(Runtime, Protocol):
    """A runtime that draws images of several sizes."""

    def image_size(self, height: int, width: int) -> ImageSize:
        """Return a size for sessions (`BaseSession.draw_at`).

        Raises:
            PromptError: the model draws no such size; says why.
        """
        ...


@runtime_checkable
class DrawsAtSize(Session, Protocol):
    """A session that draws other sizes than the model's own; `janus_modular.BaseSession` does."""

    def draw_at(self, size: ImageSize) -> None:
        """Draw images of this size from now on."""
        ...


def chosen_size(runtime: Runtime, processor: Processor, size: Any) -> ImageSize | None:
    """Return the size to draw, from (height, width), one number for both, or None; None: the model's own.

    Raises:
        PromptError: this is no size, or the model does not draw it; says why.
    """
    if size is None:
        return None
    height, width = _sides(size)
    own = processor.drawing
    if own is None:
        raise PromptError("size: found a size; expected none: this model has no generation path.")
    if (height, width) == (own.height, own.width):
        return None
    if not isinstance(runtime, DrawsSizes):
        raise PromptError(
            f"size: found {size_text(height, width)}; expected {size_text(own.height, own.width)}: the graphs"
            " of a bundle have one size. Convert the checkpoint to the other (janus-modular convert MODEL"
            f" FOLDER generation.height={height} generation.width={width}), and export that."
        )
    return runtime.image_size(height, width)


def open_session(runtime: Runtime, max_seq_len: int, size: ImageSize | None) -> Session:
    """Open a session that draws images of a size; None: the model's own."""
    session = runtime.open(max_seq_len)
    if size is not None:
        assert isinstance(session, DrawsAtSize), "a runtime with image_size opens sessions with draw_at"
        session.draw_at(size)
    return session


def size_text(height: int, width: int) -> str:
    """Return a size as commands and the server write it: WIDTHxHEIGHT."""
    return f"{width}x{height}"


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of a text WIDTHxHEIGHT.

    Raises:
        PromptError: the text is something else.
    """
    match = SIZE.fullmatch(text)
    if match is None:
        raise PromptError(f"size: found {text!r:.80}; expected WIDTHxHEIGHT in pixels, such as 512x384.")
    return int(match[2]), int(match[1])


def _sides(size: Any) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    if (
        not isinstance(sides, tuple | list)
        or len(sides) != 2
        or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    ):
        raise PromptError(f"size: found {size!r:.80}; expected (height, width) in pixels, or one number.")
    return sides[0], sides[1]
