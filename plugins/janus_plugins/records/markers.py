"""Markers such as ``<image>``, which stand in a text at the position of an image."""

from __future__ import annotations

import re
from collections.abc import Iterable

from janus_modular import DataError

MARKER = re.compile(r"<image>|<image_placeholder>")
UNSUPPORTED = re.compile(
    r"(?!<image>)<\s*(?i:images?)[\s_:#-]*\d*\s*/?>|</image>|<img>[^<]*</img>"
    r"|\[IMG(?:_BREAK|_END)?\]|\[img-\d+\]"
    r"|<(?:video|audio|ImageHere|IMG_CONTEXT|image_soft_token|im_(?:start|end|patch)"
    r"|(?:begin|start|end)_of_image)>"
    r"|<\|(?i:(?:begin_of_|start_of_|end_of_)?(?:image|img|video|audio|vision|media)"
    r"(?:_(?:pad|begin|start|end|\d+))?)\|>"
)
"""Markers of other tools and models, which are not read."""

LITERAL = "If the marker is text to learn, set the source's `markers: text`."


def first_marker(texts: Iterable[str]) -> str | None:
    """Return the first marker, of any tool, in texts; None without any."""
    matches = (pattern.search(text) for text in texts for pattern in (MARKER, UNSUPPORTED))
    return next((match[0] for match in matches if match), None)


def split_at_markers(text: str, where: str) -> list[str]:
    """Return the text before, between and after the image markers.

    Raises:
        DataError: the text has a marker of another tool, of a video or of audio.
    """
    if match := UNSUPPORTED.search(text):
        raise DataError(
            f"{where}: holds '{match[0]}'; the only marker that is read is <image>, for an image listed in"
            f" `images`. Replace the marker, or leave the sample out. {LITERAL}"
        )
    return MARKER.split(text)


def without_markers(text: str, where: str, hint: str) -> str:
    """Return a text that has no marker, where no image can belong to a marker.

    Raises:
        DataError: the text has a marker; ``hint`` says what to write instead.
    """
    if len(split_at_markers(text, where)) > 1:
        marker = MARKER.search(text)
        raise DataError(
            f"{where}: holds '{marker[0] if marker else ''}', for which there is no image. {hint} {LITERAL}"
        )
    return text
