"""Checks of sizes that no component can be built with, for ``__post_init__`` of its config."""

from __future__ import annotations

from typing import Any


def check_sizes(config: Any, **least: int) -> None:
    """Refuse sizes below ``least`` (by field name); of a list, each entry counts.

    Raises:
        ValueError: a line for each field.
    """
    faults = []
    for name, low in least.items():
        value = getattr(config, name)
        if any(one < low for one in (value if isinstance(value, list) else [value])):
            each = "each " if isinstance(value, list) else ""
            faults.append(f"{name}: {value}; expected {each}at least {low}.")
    if faults:
        raise ValueError("\n".join(faults))


def check_heads(width: int, heads: int) -> None:
    """Refuse heads that do not share ``width`` evenly.

    Raises:
        ValueError: says both.
    """
    if width % heads:
        raise ValueError(f"width {width} does not divide by {heads} heads.")
