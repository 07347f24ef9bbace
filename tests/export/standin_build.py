"""Engines for the stand-in: files that name the ONNX graph to run, and what a manifest says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from janus_export.bundle.bundle import load_bundle
from janus_export.bundle.engines import key_of
from janus_modular.foreign import sha256


def build(
    folder: Path,
    variant: str,
    target: str,
    *,
    capacity: int = 320,
    rows: int = 8,
    arch: str = "8.9",
    version: str = "10.15.1.29",
    changes: Mapping[str, Mapping[str, list[int]]] = MappingProxyType({}),
    **plan: Mapping[str, Any],
) -> str:
    """Put stand-in engines of a variant into a bundle, as `janus-modular build` would; return their key.

    ``changes`` are of a profile's ranges (``{"embed": {"tokens": [1, 1, 9]}}``, the backbone's being called
    ``prefill`` and ``decode``), ``plan`` of a graph's engine: ``decode_image={"host": ["codes"]}``.
    """
    bundle = load_bundle(folder)
    key = key_of(variant, target, [arch])
    engines = {}
    for graph in bundle.graphs:
        profiles = _profiles(bundle.manifest, graph, rows, capacity)
        for profile in profiles:
            named = profile["name"] if graph == "backbone" else graph
            profile["axes"] |= changes.get(named, {})
        source = bundle.path(graph, variant)
        file = folder / "engines" / key / f"{graph}.engine"
        file.parent.mkdir(parents=True, exist_ok=True)
        aliases = bundle.graphs[graph]["aliases"]
        content = {"graph": graph, "onnx": str(source), "profiles": profiles, "aliases": aliases}
        file.write_text(json.dumps(content | dict(plan.get(graph, {}))))
        engines[graph] = {
            "file": str(file.relative_to(folder)),
            "sha256": sha256(file),
            "bytes": file.stat().st_size,
            "seconds": 0.0,
            "peak_bytes": None,
            "inspector": None,
            "profiles": profiles,
            "source": bundle.manifest["sha256"][source.name],
            "recipe": "0" * 64,
        }
    record = {
        "variant": variant,
        "target": target,
        "arch": [arch],
        "builder": version,
        "capacity": capacity,
        "at": "2026-01-01 00:00 UTC",
        "options": {"rows": rows, "weight_streaming": False},
        "executed": False,
        "engines": engines,
    }
    bundle.record("built", key, record)
    return key


def _profiles(manifest: Mapping[str, Any], graph: str, rows: int, capacity: int) -> list[dict[str, Any]]:
    """Return ranges as `janus-modular build` chooses them."""
    used = {axis for one in manifest["graphs"][graph]["inputs"] for axis in one["shape"]}
    axes = {name: [one["min"], one["typical"], one["max"]] for name, one in manifest["axes"].items()}
    most = min(axes["tokens"][2], capacity)
    axes["tokens"] = [1, min(manifest["model"]["image_input"]["positions"], most), most]
    axes["rows"] = [1, min(axes["rows"][1], rows), rows]
    axes["capacity"] = [capacity] * 3
    if {"rows", "images"} <= used:
        axes["images"] = [axes["images"][0], min(axes["images"][1], rows), rows]
    axes = {name: lengths for name, lengths in axes.items() if name in used}
    if graph != "backbone":
        return [{"name": "default", "axes": axes}]
    return [{"name": "prefill", "axes": axes}, {"name": "decode", "axes": {**axes, "tokens": [1, 1, 1]}}]
