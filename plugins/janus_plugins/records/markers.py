"""Markers such as ``<image>``, that stand in a text where an image belongs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from janus_modular import DataError

MARKER = re.compile(r"<image>|<image_placeholder>")
OTHERS = re.compile(
    r"(?!<image>)<\s*(?i:images?)[\s_:#-]*\d*\s*>|</image>|<img>[^<]*</img>"
    r"|<(?:video|audio|ImageHere|IMG_CONTEXT|image_soft_token|im_(?:start|end|patch)"
    r"|(?:begin|start|end)_of_image)>"
    r"|<\|(?i:(?:begin_of_|start_of_|end_of_)?(?:image|img|video|audio|vision|media)"
    r"(?:_(?:pad|begin|start|end|\d+))?)\|>"
)
"""Markers of other tools and models, which are not read."""

LITERAL = "If these letters are meant to be learned, set the source's `markers: text`."


def first_marker(texts: Iterable[str]) -> str | None:
    """Return the first marker, of any tool, in some texts; None where there is none."""
    found = (pattern.search(text) for text in texts for pattern in (MARKER, OTHERS))
    return next((match[0] for match in found if match), None)


def split_at_markers(text: str, where: str) -> list[str]:
    """Return the stretches of text before, between and after the image markers.

    Raises:
        DataError: there is a marker of another tool, or of a video or a sound.
    """
    if other := OTHERS.search(text):
        raise DataError(
            f"{where}: holds '{other[0]}'; the only marker that is read is <image>, for an image listed in"
            f" `images`. Rewrite it, or leave the sample out. {LITERAL}"
        )
    return MARKER.split(text)


def without_markers(text: str, where: str, advice: str) -> str:
    """Return a text that may hold no marker, because no image could stand for it.

    Raises:
        DataError: there is a marker; ``advice`` says what to write instead.
    """
    if len(split_at_markers(text, where)) > 1:
        marker = MARKER.search(text)
        raise DataError(
            f"{where}: holds '{marker[0] if marker else ''}', for which there is no image. {advice} {LITERAL}"
        )
    return text
