"""Checks a manifest against bundle.schema.json, with a small subset of JSON Schema.

The subset needs no package: types, required keys, minimum values and lengths, enums. Patterns and unknown
keys are checked only by the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from janus_export.bundle.manifest_graphs import axes_of
from janus_export.bundle.modes import modes_of
from janus_modular.foreign import printable

SECTIONS = (
    "written_by", "source", "requires", "plugins", "model", "variants", "graphs", "axes", "cache", "digests",
    "parity",
)  # fmt: skip
"""The sections that every manifest has; results (built, executed) are optional."""

MOST_LETTERS = 512
"""Most characters of a name or a path, since error messages repeat them."""

NAMED = ("requires", "model", "variants", "graphs", "axes", "cache", "digests", "sha256", "bytes", "built")
"""The sections whose texts are names and paths."""

VERSION = re.compile(r"\d{1,9}(\.\d{1,9}){0,3}")

REQUIREMENTS = ("onnxruntime",)
"""Distributions that a bundle may require; this version cannot check others."""

TYPES: Mapping[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def problems_of(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Return where a manifest differs from its schema, and where its sections contradict each other."""
    schema = _schema()["properties"]
    problems = [problem for name in NAMED for problem in _long_names(manifest.get(name), name)] or [
        problem
        for name in SECTIONS
        for problem in (
            [f"{name} is missing"] if name not in manifest else _problems(manifest[name], schema[name], name)
        )
    ]
    yield from problems or [*_requirements(manifest["requires"]), *_gaps(manifest)]


def _long_names(value: Any, path: str) -> Iterator[str]:
    """Yield where a key or a text has more than `MOST_LETTERS`."""
    if isinstance(value, str) and len(value) > MOST_LETTERS:
        yield f"{path} is {_json(value)} of {len(value):,} letters, expected {MOST_LETTERS} at most"
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _long_names(each, f"{path}[{number}]")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from (
                [f"{path} has the key {_json(key)} of {len(key):,} letters, expected {MOST_LETTERS} at most"]
                if len(key) > MOST_LETTERS
                else _long_names(each, f"{path}.{key}")
            )


def _requirements(requires: Mapping[str, str]) -> Iterator[str]:
    """Yield requirements that are missing, unknown or not a version."""
    yield from (f"requires lacks {name}" for name in REQUIREMENTS if name not in requires)
    for name, version in requires.items():
        if name not in REQUIREMENTS:
            yield (
                f"requires has {_json(name)}, which is unknown to this version of janus-modular; expected"
                f" {', '.join(REQUIREMENTS)}"
            )
        elif not VERSION.fullmatch(version):
            yield f"requires.{name} is {_json(version)}, expected a version such as 1.25 or 1.25.1"


@cache
def _schema() -> dict[str, Any]:
    text = files("janus_export").joinpath("bundle.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _problems(value: Any, schema: Any, path: str) -> Iterator[str]:
    if not isinstance(schema, dict):  # true: anything
        return
    if "$ref" in schema:
        schema = _schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    if "oneOf" in schema:
        tried = [list(_problems(value, alternative, path)) for alternative in schema["oneOf"]]
        yield from min(tried, key=len)
        return
    type_names = schema.get("type", [])
    type_names = [type_names] if isinstance(type_names, str) else type_names
    if type_names and not any(_is(value, type_name) for type_name in type_names):
        yield f"{path} is {_json(value)}, expected {' or '.join(type_names)}"
    elif value not in schema.get("enum", [value]):
        yield f"{path} is {_json(value)}, expected one of {', '.join(map(str, schema['enum']))}"
    elif isinstance(value, dict):
        if missing := [key for key in schema.get("required", ()) if key not in value]:
            yield f"{path} lacks {', '.join(missing)}"
        if len(value) < schema.get("minProperties", 0):
            yield f"{path} is empty"
        known = schema.get("properties", {})
        for key, item in value.items():
            yield from _problems(item, known.get(key, schema.get("additionalProperties")), f"{path}.{key}")
    elif isinstance(value, list):
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not least <= len(value) <= most:
            yield f"{path} has {len(value)} entries, expected {least} to {most}"
        for number, item in enumerate(value):
            yield from _problems(item, schema.get("items"), f"{path}[{number}]")
    elif _is(value, "number") and value < schema.get("minimum", value):
        yield f"{path} is {value}, expected {schema['minimum']} at least"


def _gaps(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Return the graphs and axes that are used but not described."""
    graphs, axes = manifest["graphs"], manifest["axes"]
    for name, variant in manifest["variants"].items():
        if unknown := sorted(set(variant["files"]) - set(graphs)):
            yield f"variants.{name} has files of {', '.join(unknown)}, which graphs lacks"
    if (modes := manifest.get("modes")) is not None and modes != modes_of(graphs):
        yield f"modes are {_json(modes)}; its graphs support {_json(modes_of(graphs))}"
    for name, graph in graphs.items():
        if unknown := sorted(set(axes_of([graph])) - set(axes)):
            yield f"graphs.{name} has lengths called {', '.join(unknown)}, which axes lacks"


def _is(value: Any, type_name: str) -> bool:
    return isinstance(value, TYPES[type_name]) and (type_name == "boolean" or not isinstance(value, bool))


def _json(value: Any) -> str:
    return printable(json.dumps(value, ensure_ascii=False), most=43)
