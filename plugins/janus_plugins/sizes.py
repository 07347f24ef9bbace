"""Checks of sizes: those that no component can be built with, and images that it does not take."""

from __future__ import annotations

from typing import Any


def check_sizes(config: Any, **least: int) -> None:
    """Refuse sizes below ``least`` (by field name); of a list, each entry counts.

    Raises:
        ValueError: a line for each field.
    """
    errors = []
    for name, low in least.items():
        value = getattr(config, name)
        if any(one < low for one in (value if isinstance(value, list) else [value])):
            each = "each " if isinstance(value, list) else ""
            errors.append(f"{name}: {value}; expected {each}at least {low}.")
    if errors:
        raise ValueError("\n".join(errors))


def check_heads(dim: int, heads: int) -> None:
    """Check that ``dim`` features divide evenly among attention heads.

    Raises:
        ValueError: they do not.
    """
    if dim % heads:
        raise ValueError(f"{dim} features do not divide by {heads} heads.")


def squares(component: str, height: int, width: int, side: int) -> tuple[int, int]:
    """Return the rows and columns of squares that an image is cut into, ``side`` pixels wide.

    Raises:
        ValueError: it is not cut evenly, or has no size.
    """
    if height % side or width % side or not height or not width:
        raise ValueError(f"{component}: {height}x{width} is no multiple of {side} on both sides")
    return height // side, width // side
