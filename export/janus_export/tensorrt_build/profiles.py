"""Optimisation profiles of engines, derived from the axes of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from janus_export.bundle.engines import Profile
from janus_export.bundle.manifest_graphs import axes_of
from janus_export.errors import ExportError

Range = tuple[int, int, int]
"""Minimum, typical, maximum."""


@dataclass(frozen=True)
class Lengths:
    """The lengths of the axes of a bundle's engines."""

    rows: int  # maximum batch rows
    capacity: int  # positions per row

    @classmethod
    def choose(cls, axes: Mapping[str, Mapping[str, int]], rows: int | None, capacity: int | None) -> Lengths:
        """Return the requested lengths, or those that the bundle was exported for.

        Raises:
            ExportError: more than the bundle was exported for.
        """
        return cls(
            _within("rows", axes["rows"], rows, axes["rows"]["max"], "for more, export a bundle with rows=N"),
            _within(
                "capacity",
                axes["capacity"],
                capacity,
                axes["capacity"]["typical"],
                "the model's context is the limit",
            ),
        )


def profiles(manifest: Mapping[str, Any], graph: str, lengths: Lengths) -> tuple[Profile, ...]:
    """Return the profiles of a graph's engine: the backbone has one for prompts and one for single steps."""
    record = manifest["graphs"][graph]
    names = dict.fromkeys(axes_of([{"inputs": record["inputs"], "outputs": []}]))
    axes = {name: _range(name, manifest, lengths) for name in names}
    if "rows" in axes and "images" in axes:  # without guidance, each row is an instance of its own
        least, default, _ = axes["images"]
        axes["images"] = (least, min(default, lengths.rows), lengths.rows)
    if graph != "backbone":
        return (Profile("default", axes),)
    return (Profile("prefill", axes), Profile("decode", {**axes, "tokens": (1, 1, 1)}))


def _range(name: str, manifest: Mapping[str, Any], lengths: Lengths) -> Range:
    axis = manifest["axes"][name]
    if name == "capacity":
        return (lengths.capacity,) * 3
    if name == "rows":
        return (1, min(axis["typical"], lengths.rows), lengths.rows)
    if name == "tokens":  # a typical prompt consists mostly of an input image
        most = min(axis["max"], lengths.capacity)
        return (1, min(manifest["model"]["image_input"].get("positions", 1), most), most)
    return (axis["min"], axis["typical"], axis["max"])


def _within(name: str, axis: Mapping[str, int], requested: int | None, default: int, more: str) -> int:
    chosen = default if requested is None else requested
    if not axis["min"] <= chosen <= axis["max"]:
        raise ExportError(f"--{name} {chosen}: this bundle takes {axis['min']} to {axis['max']} ({more}).")
    return chosen
