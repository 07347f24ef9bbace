"""Turns a resolved config back into a mapping or YAML, so that a checkpoint can be rebuilt from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from janus_modular.interfaces import ComponentSpec


def to_plain(value: Any) -> Any:
    """Return mappings, lists and single values; a `ComponentSpec` becomes ``{name: ..., **options}``.

    Defaults are written out: a checkpoint must not change when a default does.
    """
    if isinstance(value, ComponentSpec):
        return {"name": value.name, **to_plain(value.config)}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value) if field.init}
    if isinstance(value, Mapping):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(value: Any) -> str:
    """Return a resolved (or raw) config as YAML; lists and mappings of single values take one line."""
    return yaml.safe_dump(
        to_plain(value), sort_keys=False, allow_unicode=True, width=110, default_flow_style=None
    )


def component_specs(config: Any) -> Iterator[tuple[str, ComponentSpec]]:
    """Yield every component in a resolved config with its path: outer ones before those inside them."""
    yield from _parts(config, "")


def module_path(path: str) -> str:
    """Return where in a model the component at a config's path is: ``encoders[0]`` as ``encoders.0``."""
    return path.replace("[", ".").replace("]", "")


def _parts(value: Any, path: str) -> Iterator[tuple[str, ComponentSpec]]:
    if isinstance(value, ComponentSpec):
        yield path, value
        yield from _parts(value.config, path)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _parts(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _parts(one, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _parts(one, f"{path}[{index}]")
