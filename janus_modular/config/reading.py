"""Loads a config: reads its YAML, inserts the model that it names, and applies overrides."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from janus_modular.config.interpolation import interpolate
from janus_modular.config.overrides import Override, apply, parse
from janus_modular.config.presets import find, shipped_folder
from janus_modular.errors import ConfigError
from janus_modular.foreign import depth_exceeds, foreign_errors, read_text
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.plugins.catalogue import BUILT_IN

MAX_BYTES = 4 * 2**20
"""Largest size of a config file; a larger file is an error before it is read."""

MAX_NODES = 10_000
"""Most values of a config with its aliases expanded: OmegaConf takes up to a millisecond for each."""


def load(
    config: str | Path | Mapping[str, Any],
    overrides: Iterable[str] = (),
    plugins: Plugins | None = None,
    *,
    named_in: str | Path | None = None,
) -> dict[str, Any]:
    """Return a config as plain mappings and lists, overridden and interpolated, not yet checked.

    Args:
        config: a path, a shipped name (``train/janus_pro/stage1``, ``tiny``) or a mapping. Names in a shipped
            file mean built-in components, also where a plugin provides components of the same names.
        overrides: ``a.b=c``; they reach inside the model that a top-level ``model: NAME`` names.
        plugins: the known components: a change of a component's name drops its old options.
        named_in: the config that names this one, for the hint of an error.

    Raises:
        ConfigError: there is no such file, it is not YAML, or an override is not written ``a.b=c``.
    """
    return _load(config, [parse(text) for text in overrides], plugins or default_plugins(), named_in)


def _load(
    config: str | Path | Mapping[str, Any],
    overrides: list[Override],
    plugins: Plugins,
    named_in: str | Path | None,
) -> dict[str, Any]:
    if isinstance(config, Mapping):
        file, tree = None, _copied(config)
    else:
        file = find(config, named_in=named_in)
        tree = _read(file, plugins)
    inside: list[Override] = []
    for keys, value in overrides:
        if keys == ["model"]:
            tree["model"] = value
    if isinstance(tree.get("model"), str):
        inside = [(keys[1:], value) for keys, value in overrides if keys[0] == "model" and len(keys) > 1]
        tree["model"] = _load(tree["model"], inside, plugins, file)
    done = {("model", *keys) for keys, _ in inside} | {("model",)}
    apply(
        tree, [change for change in overrides if tuple(change[0]) not in done], share_slot=plugins.share_slot
    )
    return interpolate(tree)[0]


def _copied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a config that was not read from YAML: a checkpoint's, or a mapping made in Python.

    Raises:
        ConfigError: the config has more than `MAX_NODES` values.
    """
    values: list[Any] = [dict(config)]
    for value in values:  # the list grows while it is iterated
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        if len(values) > MAX_NODES:
            raise ConfigError(f"the config has more than {MAX_NODES:,} values. Is it a config at all?")
    return deepcopy(values[0])


def override(tree: Mapping[str, Any], overrides: Iterable[str], plugins: Plugins) -> dict[str, Any]:
    """Return a component's options with overrides applied; unlike `load`, no key names another config.

    Raises:
        ConfigError: an override is not written ``a.b=c``.
    """
    changed = deepcopy(dict(tree))
    apply(changed, map(parse, overrides), share_slot=plugins.share_slot)
    return interpolate(changed)[0]


def _read(path: Path, plugins: Plugins) -> dict[str, Any]:
    tree = read(path)
    if path.resolve().is_relative_to(shipped_folder().resolve()) and (shared := plugins.shared_built_ins()):
        tree = _qualify_built_ins(tree, shared)
    return tree


def _qualify_built_ins(tree: Any, shared: Collection[str]) -> Any:
    """Write the names ``shared`` with plugins as ``janus-modular:NAME``: a shipped file means the built-in.

    Users' overrides are not qualified: an ambiguous name there is an error that lists the candidates.
    """
    if isinstance(tree, list):
        return [_qualify_built_ins(item, shared) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: f"{BUILT_IN}:{value}" if key == "name" and value in shared else _qualify_built_ins(value, shared)
        for key, value in tree.items()
    }


def read(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping, interpolations left as they are.

    Raises:
        ConfigError: the file is not YAML, not a mapping, too large or too deeply nested.
    """
    text = read_text(path, ConfigError, most=MAX_BYTES)
    with foreign_errors(path, ConfigError, "Expected a config in YAML: keys and values."):
        if (count := expanded_nodes(yaml.compose(text, Loader=yaml.SafeLoader))) > MAX_NODES:
            raise ConfigError(
                f"{path} has {count:,} values once its aliases (*NAME) are written out; at most {MAX_NODES:,}"
                " are taken. Use fewer aliases."
            )
        tree = OmegaConf.to_container(OmegaConf.create(text))
    if depth_exceeds(tree):
        raise ConfigError(f"{path} is nested too deeply for a config.")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found a {type(tree).__name__}, expected a mapping (key: value)")
    return {str(key): value for key, value in tree.items()}


def expanded_nodes(root: yaml.Node | None) -> int:
    """Return how many values a YAML document has with every alias expanded; more than the limit for a cycle.

    The parser shares the object of an alias, but every later step copies it: ten lines of nested aliases
    expand to a billion values.
    """
    counts: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        if id(node) not in counts:
            counts[id(node)] = MAX_NODES + 1  # until it is counted: a node that contains itself is a cycle
            inner = (
                [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else []
            )
            inner = node.value if isinstance(node, yaml.SequenceNode) else inner
            counts[id(node)] = 1 + sum(map(count, inner))
        return counts[id(node)]

    return 0 if root is None else count(root)
