"""Changes from the command line: ``a.b=c``, in a tree of mappings and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import OmegaConf

from janus_modular.errors import ConfigError
from janus_modular.foreign import MAX_DEPTH, depth_exceeds, printable, reason

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
            f"'{printable(text)}' is no override: write PATH=VALUE,"
            " for instance backbone.config.hidden_size=64"
        )
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]
    except Exception as error:  # of YAML, or of the grammar of interpolations
        raise ConfigError(f"'{printable(text)}': its value is not YAML: {reason(error)}.") from error
    if depth_exceeds(parsed):
        raise ConfigError(f"'{printable(text)}': its value is nested deeper than {MAX_DEPTH} levels.")
    return keys, parsed


def apply(
    tree: dict[str, Any], overrides: Iterable[Override], *, share_slot: Callable[[str, str], bool]
) -> None:
    """Apply overrides to ``tree``, in place.

    A change of a component's name drops the old component's options: they mean nothing to the new one.
    ``encoder=siglip`` is short for ``encoder.name=siglip``. What replaces a whole mapping goes before what
    changes a part of it, so overrides may come in any order and none undoes another; of two for the same
    path, the last counts.

    Args:
        share_slot: whether two names are those of components that could stand in the same place.
    """
    changes: list[tuple[Override, bool]] = []  # and whether the value is the name of another component
    for keys, value in overrides:
        place = keys[:-1] if keys[-1] == "name" else keys
        names = isinstance(value, str) and _holds_component(_get(tree, place), value, share_slot)
        changes.append(((place if names else keys, value), names))
    for (keys, value), names in sorted(changes, key=lambda change: len(change[0][0])):
        if not names:
            _set(tree, keys, value)
            continue
        here = _get(tree, keys)
        if not isinstance(here, dict):
            _set(tree, keys, value)  # a name alone, which may also be a text: the same is written either way
        elif here.get("name") != value:
            _set(tree, keys, {"name": value})


def _holds_component(here: Any, name: str, share_slot: Callable[[str, str], bool]) -> bool:
    """Return True if ``here`` holds a component that ``name`` could replace, by its name or as a mapping."""
    old = here.get("name") if isinstance(here, dict) else here
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
