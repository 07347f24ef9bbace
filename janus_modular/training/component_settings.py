"""Checks of a run's settings that name components by their paths. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POLICIES = ("ddp", "fsdp")
"""How a component lies on several processes: whole on each of them, or sharded over all."""


def wrap_errors(wraps: Any, init: str | None) -> list[str]:
    """Return an error where ``wrap`` does not name components of ``init``, with what is put around each."""
    expected = "expected component paths with what wraps each: wrap={backbone: {name: lora, rank: 16}}"
    if wraps is None:
        return []
    if not isinstance(wraps, dict) or isinstance(wraps.get("name"), str):
        return [f"wrap: found {wraps!r:.60}; {expected}."]
    if wraps and init is None:
        return ["wrap: wraps components of init, which is not set; write them into model."]
    return [
        f"wrap.{path}: found {wrap!r:.60}; {expected}."
        for path, wrap in wraps.items()
        if not isinstance(wrap, dict) or not isinstance(wrap.get("name"), str)
    ]


def policy_errors(policies: Mapping[str, str]) -> list[str]:
    """Return an error for each component whose policy on several processes is unknown."""
    return [
        f"parallel.{name}: found {policy!r:.60}; expected ddp (whole on each process) or fsdp (sharded)."
        for name, policy in policies.items()
        if policy not in POLICIES
    ]
