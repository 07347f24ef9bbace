"""Checks of sizes in configs, and of image sizes."""

from __future__ import annotations

from typing import Any


def check_sizes(config: Any, **least: int) -> None:
    """Check that fields are at least the values of ``least``, by field name; in a list, each entry.

    Raises:
        ValueError: lists the fields that are less, one a line.
    """
    errors = []
    for name, low in least.items():
        value = getattr(config, name)
        if any(number < low for number in (value if isinstance(value, list) else [value])):
            each = "each " if isinstance(value, list) else ""
            errors.append(f"{name}: {value}; expected {each}at least {low}.")
    if errors:
        raise ValueError("\n".join(errors))


def check_heads(dim: int, heads: int) -> None:
    """Check that ``dim`` features divide evenly among attention heads.

    Raises:
        ValueError: the features do not divide evenly.
    """
    if dim % heads:
        raise ValueError(f"{dim} features do not divide by {heads} heads.")


def squares(component: str, height: int, width: int, side: int) -> tuple[int, int]:
    """Return the rows and columns of an image's square patches, each with a side of ``side`` pixels.

    Raises:
        ValueError: the patches do not cover the image exactly.
    """
    if height % side or width % side or not height or not width:
        raise ValueError(f"{component}: {height}x{width} is no multiple of {side} on both sides")
    return height // side, width // side
