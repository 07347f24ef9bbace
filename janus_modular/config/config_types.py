"""Which dataclass a config file is an instance of, told by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from janus_modular.errors import ConfigError

KINDS = {
    "model": ("backbone", "janus_modular.config.schema", "ModelConfig"),
    "train": ("learn", "janus_modular.training.schema", "TrainConfig"),
    "demo": ("stages", "janus_modular.demo.schema", "DemoConfig"),
}
"""Kind of config -> a key that only this kind has, and where its dataclass is."""

WORDS = {"model": "model", "train": "training", "demo": "demo"}
"""How people call each kind."""

GROUP = "janus_modular.configs"
"""The entry points of kinds that other packages bring: ``key = "module:Dataclass"``."""


def schema_of(raw: Mapping[str, Any]) -> type[Any]:
    """Return the dataclass that ``raw`` should be an instance of.

    Raises:
        ConfigError: it has the keys of no kind of config.
    """
    for key, module, name in KINDS.values():
        if key in raw:
            return getattr(import_module(module), name)
    others = {point.name: point for point in entry_points(group=GROUP)}
    for key, point in others.items():
        if key in raw:
            return point.load()
    telling = ", ".join(
        [f"'{key}' ({kind})" for kind, (key, _, _) in KINDS.items()] + [f"'{key}'" for key in others]
    )
    keys = ", ".join(map(str, raw)) or "(none)"
    raise ConfigError(f"found the keys {keys}; expected one that tells the kind of config: {telling}")


def check_kind(raw: Mapping[str, Any], schema: type[Any]) -> None:
    """Refuse a config of another kind than ``schema``: its keys would all be unknown.

    Raises:
        ConfigError: says which kind it is, and which was expected.
    """
    kinds = {kind: (key, (module, name)) for kind, (key, module, name) in KINDS.items()}
    wanted = next((kind for kind, (_, home) in kinds.items() if home == _home(schema)), None)
    if wanted is None or kinds[wanted][0] in raw:
        return
    found = next((kind for kind, (key, _) in kinds.items() if key in raw), None)
    if found is not None:
        raise ConfigError(f"this is a {WORDS[found]} config; expected a {WORDS[wanted]} config")


def _home(schema: type[Any]) -> tuple[str, str]:
    return schema.__module__, schema.__name__
