"""What may differ between the settings of a checkpoint and those of the run that goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IRRELEVANT = {
    "changed_data",
    "workers",
    "device",
    "checkpoint_every",
    "keep",
    "log_every",
    "output",
    "trackers",
}
"""No step is computed from these."""

REPAIRS = {
    "bad_samples",
    "optimizer",
    "schedule",
    "length",
    "accumulate",
    "supervise",
    "condition_dropout",
    "dtype",
}
"""Steps are computed from these, and a run may need to change them to go on; options of sources, too."""

REASONS = {
    "init": "a run begins once",
    "batch": "the order of samples follows from it; to need less memory, raise accumulate",
    "mixture": "the order of samples follows from it",
    "seed": "the order of samples follows from it",
    "sources": "the order of samples follows from their names",
    "learn": "the optimizer's state belongs to what learned",
    "model": "the checkpoint holds the model",
    "wrap": "the checkpoint holds the model",
}
"""Why the others may not."""


@dataclass(frozen=True)
class Change:
    """A setting that differs."""

    key: str
    then: Any  # in the checkpoint
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.then!r} then, {self.now!r} now"


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return what differs between two plain configs, by dotted keys; not what no step is computed from."""
    before, after = _flat(then), _flat(now)
    return [
        Change(key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key.partition(".")[0] not in IRRELEVANT
    ]


def may_change(change: Change) -> bool:
    """Return whether a run may go on with a change."""
    first, *rest = change.key.split(".")
    is_option = first == "sources" and len(rest) > 1 and rest[1] != "name"
    return first in REPAIRS or is_option


def refused(change: Change) -> str:
    """Return a line about a change that a run may not go on with."""
    reason = REASONS.get(change.key.partition(".")[0])
    return f"  {change} ({reason})" if reason else f"  {change}"


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {
            key: value
            for name, branch in tree.items()
            for key, value in _flat(branch, f"{path}.{name}".lstrip(".")).items()
        }
    return {path: tree}
