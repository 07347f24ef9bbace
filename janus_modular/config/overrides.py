"""Changes from the command line: ``a.b=c``, in a tree of mappings and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from janus_modular.errors import ConfigError

Override = tuple[list[str], Any]
"""Where, as keys, and the new value."""


def parse(text: str) -> Override:
    """Read ``a.b=c``; the value is YAML, so that ``[1, 2]``, ``null`` and ``1e-3`` mean what they say.

    Raises:
        ConfigError: it is not written so.
    """
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"'{text}' is no override: write PATH=VALUE, for instance backbone.config.hidden_size=64"
        )
    try:
        return keys, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"'{text}': its value is not YAML: {' '.join(str(error).split())}") from error


def apply(
    tree: dict[str, Any], overrides: Iterable[Override], *, is_component: Callable[[str], bool]
) -> None:
    """Apply overrides to ``tree``, in place.

    A change of a component's name drops the old component's options: they mean nothing to the new one.
    So names are changed first, outer ones before inner ones, and options may come in any order.
    ``encoder=siglip`` is short for ``encoder.name=siglip``.
    """
    options: list[Override] = []
    names: list[Override] = []
    for keys, value in overrides:
        if isinstance(value, str) and keys[-1] != "name" and _is_slot(_get(tree, keys), value, is_component):
            names.append(([*keys, "name"], value))
        elif (
            isinstance(value, str)
            and keys[-1] == "name"
            and _is_slot(_get(tree, keys[:-1]), value, is_component)
        ):
            names.append((keys, value))
        else:
            options.append((keys, value))
    for keys, value in sorted(names, key=lambda override: len(override[0])):
        slot = _get(tree, keys[:-1])
        if not isinstance(slot, dict) or slot.get("name") != value:
            _set(tree, keys[:-1], {"name": value})
    for keys, value in options:
        _set(tree, keys, value)


def _is_slot(here: Any, name: str, is_component: Callable[[str], bool]) -> bool:
    """Say whether ``here`` holds a component: one with a known name, or a mapping about to get one."""
    if isinstance(here, dict) and isinstance(here.get("name"), str):
        return is_component(here["name"]) or is_component(name)
    return isinstance(here, str) and is_component(here) and is_component(name)


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
    here: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not (key.isdecimal() and int(key) < len(here)):
                raise ConfigError(
                    f"{'.'.join(keys)}: '{'.'.join(keys[:depth])}' is a list of {len(here)}, so that '{key}' "
                    f"must be a number below {len(here)}"
                )
            index: Any = int(key)
            child = here[index]
        else:
            index, child = key, here.get(key)
        if last:
            here[index] = value
            return
        if isinstance(child, str):  # `encoder: siglip` is short for `encoder: {name: siglip}`
            child = {"name": child}
        here[index] = child if isinstance(child, dict | list) else {}
        here = here[index]
