"""Writes a resolved config as a mapping or YAML, from which a checkpoint can be rebuilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from janus_modular.interfaces import ComponentSpec


def to_plain(value: Any) -> Any:
    """Return mappings, lists and single values; a `ComponentSpec` becomes ``{name: ..., **options}``.

    Defaults are written too: a checkpoint must not change when a default does.
    """
    if isinstance(value, ComponentSpec):
        return {"name": value.name, **to_plain(value.config)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(value: Any) -> str:
    """Return a resolved (or raw) config as YAML; lists and mappings of single values take one line."""
    return yaml.safe_dump(
        to_plain(value), sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted keys; an empty mapping is a value."""
    if isinstance(tree, Mapping) and tree:
        return {
            key: value
            for name, branch in tree.items()
            for key, value in flatten(branch, f"{path}.{name}".lstrip(".")).items()
        }
    return {path: tree}


def component_specs(config: Any) -> Iterator[tuple[str, ComponentSpec]]:
    """Yield the path and spec of every component in a resolved config, outer before inner components."""
    yield from _specs(config, "")


def module_path(path: str) -> str:
    """Return the module path of a component's config path: ``encoders.0`` for ``encoders[0]``."""
    return path.replace("[", ".").replace("]", "")


def _specs(value: Any, path: str) -> Iterator[tuple[str, ComponentSpec]]:
    if isinstance(value, ComponentSpec):
        yield path, value
        yield from _specs(value.config, path)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _specs(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _specs(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _specs(item, f"{path}[{index}]")
