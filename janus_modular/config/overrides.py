"""Parses overrides (``a.b=c``) and applies them to a tree of mappings and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import OmegaConf

from janus_modular.errors import ConfigError
from janus_modular.foreign import MAX_DEPTH, depth_exceeds, printable, reason

Override = tuple[list[str], Any]
"""The path of the changed value, as keys, and its new value."""


def parse(text: str) -> Override:
    """Parse ``a.b=c``; the value is YAML, so that ``[1, 2]``, ``null`` and ``1e-3`` have their YAML types.

    Raises:
        ConfigError: the text has another form, or its value is not YAML.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"'{printable(text)}' is no override: write PATH=VALUE,"
            " for instance backbone.config.hidden_size=64"
        )
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]
    except Exception as error:  # errors of YAML and of OmegaConf's interpolation grammar
        raise ConfigError(f"'{printable(text)}': its value is not YAML: {reason(error)}.") from error
    if depth_exceeds(parsed):
        raise ConfigError(f"'{printable(text)}': its value is nested deeper than {MAX_DEPTH} levels.")
    return keys, parsed


def apply(
    tree: dict[str, Any], overrides: Iterable[Override], *, share_slot: Callable[[str, str], bool]
) -> None:
    """Apply overrides to ``tree``, in place.

    A change of a component's name drops the old component's options, which the new component does not
    have. ``encoder=siglip`` is short for ``encoder.name=siglip``. Overrides of whole mappings are applied
    before overrides of values inside them, so the order of overrides does not matter; of two overrides of
    the same path, the last counts.

    Args:
        share_slot: returns True if components of two names fill the same slot.
    """
    changes: list[tuple[Override, bool]] = []  # True where the value is the name of another component
    for keys, value in overrides:
        parent = keys[:-1] if keys[-1] == "name" else keys
        is_name = isinstance(value, str) and _holds_component(_get(tree, parent), value, share_slot)
        changes.append(((parent if is_name else keys, value), is_name))
    for (keys, value), is_name in sorted(changes, key=lambda change: len(change[0][0])):
        if not is_name:
            _set(tree, keys, value)
            continue
        old = _get(tree, keys)
        if not isinstance(old, dict):
            _set(tree, keys, value)  # a component's name or any other text: both are stored as text
        elif old.get("name") != value:
            _set(tree, keys, {"name": value})


def _holds_component(node: Any, name: str, share_slot: Callable[[str, str], bool]) -> bool:
    """Return True if ``node`` (a name or a mapping) is a component that ``name`` could replace."""
    old = node.get("name") if isinstance(node, dict) else node
    return isinstance(old, str) and share_slot(old, name)


def _get(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        if isinstance(tree, list) and key.isdecimal() and int(key) < len(tree):
            tree = tree[int(key)]
        elif isinstance(tree, dict):
            tree = tree.get(key)
        else:
            return None
    return tree


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not (key.isdecimal() and int(key) < len(node)):
                raise ConfigError(
                    f"{'.'.join(keys)}: '{'.'.join(keys[:depth])}' is a list of {len(node)}, so that '{key}' "
                    f"must be a number below {len(node)}"
                )
            index: Any = int(key)
            child = node[index]
        else:
            index, child = key, node.get(key)
        if last:
            node[index] = value
            return
        if isinstance(child, str):  # `encoder: siglip` is short for `encoder: {name: siglip}`
            child = {"name": child}
        node[index] = child if isinstance(child, dict | list) else {}
        node = node[index]
