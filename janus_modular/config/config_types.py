"""Which dataclass a config file is an instance of: each type of config has a key that no other type has."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from janus_modular.errors import ConfigError

GROUP = "janus_modular.configs"
"""The entry points of config types of other packages: ``key = "module:NameConfig"``."""

CORE_TYPES = [
    EntryPoint("backbone", "janus_modular.config.schema:ModelConfig", GROUP),
    EntryPoint("learn", "janus_modular.training.schema:TrainConfig", GROUP),
    EntryPoint("evaluate", "janus_modular.evaluation.schema:EvalConfig", GROUP),
    EntryPoint("host", "janus_modular.server.settings:ServerConfig", GROUP),
    EntryPoint("chain", "janus_modular.training.chain:ChainConfig", GROUP),
]
"""The core's own config types, as entry points too: nothing is imported before a file is recognised."""


def schema_of(raw: Mapping[str, Any]) -> type[Any]:
    """Return the dataclass that ``raw`` should be an instance of.

    Raises:
        ConfigError: ``raw`` has the key of no config type.
    """
    config_types = _config_types()
    for config_type in config_types:
        if config_type.name in raw:
            return config_type.load()
    keys = ", ".join(map(str, raw)) or "(none)"
    expected = ", ".join(f"'{config_type.name}' ({_described(config_type)})" for config_type in config_types)
    raise ConfigError(
        f"found the keys {keys}; expected a key by which the type of config is recognised: {expected}"
    )


def check_config_type(raw: Mapping[str, Any], schema: type[Any]) -> None:
    """Raise an error if ``raw`` is a config of another type than ``schema``: all its keys would be unknown.

    Raises:
        ConfigError: names the type that was found and the one that was expected.
    """
    config_types = _config_types()
    expected = next((t for t in config_types if t.value == f"{schema.__module__}:{schema.__name__}"), None)
    if expected is None or expected.name in raw:
        return
    actual = next((config_type for config_type in config_types if config_type.name in raw), None)
    if actual is not None:
        raise ConfigError(
            f"this is {_described(actual)}; expected {_described(expected)}."
            " See the shipped ones with: janus-modular config list"
        )


def _config_types() -> list[EntryPoint]:
    return [*CORE_TYPES, *entry_points(group=GROUP)]


def _described(config_type: EntryPoint) -> str:
    """Return how people call a config of a type: ``DemoConfig`` is a demo config."""
    word = config_type.attr.removesuffix("Config").lower()
    word = "training" if word == "train" else word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word} config"
