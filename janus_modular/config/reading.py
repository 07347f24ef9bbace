"""Reads a config file, puts the model that it names in place, and applies overrides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from janus_modular.config.interpolation import interpolate
from janus_modular.config.overrides import Override, apply, parse
from janus_modular.config.shipped import find
from janus_modular.errors import ConfigError
from janus_modular.plugins import Plugins, default_plugins


def load(
    config: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), plugins: Plugins | None = None
) -> dict[str, Any]:
    """Return a config as plain mappings and lists, overridden and interpolated, not yet checked.

    Args:
        config: a path, a shipped name (``train/janus_pro/stage1``, ``tiny``) or a mapping.
        overrides: ``a.b=c``; they reach inside the model that a top-level ``model: NAME`` names.
        plugins: the known components: a change of a component's name drops its old options.

    Raises:
        ConfigError: there is no such file, it is not YAML, or an override is not written ``a.b=c``.
    """
    return _load(config, [parse(text) for text in overrides], plugins or default_plugins())


def _load(
    config: str | Path | Mapping[str, Any], overrides: list[Override], plugins: Plugins
) -> dict[str, Any]:
    tree = deepcopy(dict(config)) if isinstance(config, Mapping) else read(find(config))
    inside: list[Override] = []
    for keys, value in overrides:
        if keys == ["model"]:
            tree["model"] = value
    if isinstance(tree.get("model"), str):
        inside = [(keys[1:], value) for keys, value in overrides if keys[0] == "model" and len(keys) > 1]
        tree["model"] = _load(tree["model"], inside, plugins)
    done = {("model", *keys) for keys, _ in inside} | {("model",)}
    apply(tree, [one for one in overrides if tuple(one[0]) not in done], is_component=plugins.knows)
    return interpolate(tree)[0]


def read(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, interpolations left as they are.

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}, expected a mapping (key: value)")
    return {str(key): value for key, value in tree.items()}
