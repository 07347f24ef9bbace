"""Which dataclass a config file is a picture of, told by its keys."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from janus_modular.errors import ConfigError

KINDS = {
    "model": ("backbone", "janus_modular.schema", "ModelConfig"),
    "train": ("learn", "janus_modular.training.schema", "TrainConfig"),
    "demo": ("stages", "janus_modular.demo.schema", "DemoConfig"),
}
"""Kind of config -> a key that only this kind has, and where its dataclass is."""

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
