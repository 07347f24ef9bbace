"""Checks a config against dataclasses, key by key, and builds them: every fault is collected first."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from janus_modular.config.config_types import check_config_type
from janus_modular.config.errors import FieldError, config_error
from janus_modular.config.interpolation import interpolate
from janus_modular.config.scalars import convert, words
from janus_modular.errors import JanusError
from janus_modular.foreign import printable, reason
from janus_modular.interfaces import ComponentSpec
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.registry import MODEL_SLOTS, a_component, slot_label
from janus_modular.suggest import did_you_mean

T = TypeVar("T")


def resolve(raw: Mapping[str, Any], schema: type[T], plugins: Plugins | None = None) -> T:
    """Return ``raw`` as an instance of the dataclass ``schema``, its components as `ComponentSpec`s.

    Raises:
        ConfigError: lists every fault, each with its path, what was expected, and the cure; or says that
            this is another kind of config.
    """
    check_config_type(raw, schema)
    tree, errors = interpolate(dict(raw))
    walk = _Walk(plugins or default_plugins(), errors)
    instance = walk.dataclass(tree, schema, "", what=schema.__name__)
    if walk.errors:
        raise config_error(walk.errors, of_components=walk.met_components)
    return cast(T, instance)


class _Walk:
    """Goes through a config; where something is wrong it notes a fault, returns None and goes on."""

    def __init__(self, plugins: Plugins, errors: list[FieldError]) -> None:
        self.plugins = plugins
        self.errors = errors
        self.unresolved = {error.path for error in errors}
        self.met_components = False  # whether any field that was looked at is a component's

    def error(self, path: str, found: str, expected: str, hint: str = "") -> Any:
        """Note a fault; None stands for the value that could not be built."""
        self.errors.append(FieldError(path, found, expected, hint))

    def dataclass(self, raw: Any, schema: type[Any], path: str, *, what: str) -> Any:
        """Build ``schema`` from a mapping; ``what`` it is the config of."""
        if not isinstance(raw, Mapping):
            return self.error(path, _found(raw), f"a mapping (key: value) for {what}")
        before, unresolved = len(self.errors), False
        known = {field.name: field for field in fields(schema) if field.init}
        for key in raw:
            if key not in known:
                self.error(
                    _join(path, key),
                    "unknown key",
                    f"one of {', '.join(known)}",
                    did_you_mean(str(key), known),
                )
        try:
            hints = get_type_hints(schema)
        except Exception as error:
            return self.error(
                path, f"{what} has annotations that cannot be read: {error}", "", "Tell its author."
            )
        values, sound = {}, set[str]()
        for name, field in known.items():
            count = len(self.errors)
            values[name] = self.field(raw, field, hints[name], _join(path, name))
            if _join(path, name) in self.unresolved:
                values[name], unresolved = MISSING, True
            elif len(self.errors) > count and values[name] is None:
                values[name] = MISSING
            elif len(self.errors) == count and name in raw:
                sound.add(name)
        if len(self.errors) > before or unresolved:
            return self.go_on(schema, values, path, sound)
        try:
            return schema(**{name: value for name, value in values.items() if value is not MISSING})
        except Exception as error:  # what __post_init__ has to say, or stumbles over
            said = str(error) if isinstance(error, ValueError | TypeError | JanusError) else reason(error)
            for line in said.splitlines():
                self.refusal(line, known, path)
            return None

    def go_on(self, schema: type[Any], values: dict[str, Any], path: str, sound: set[str]) -> None:
        """Hear what ``__post_init__`` has to say about the ``sound`` fields, beside others with faults.

        Those hold their defaults, or None, so it may stumble: only what it says of sound ones by name counts.
        """
        half = object.__new__(schema)
        try:
            for field in fields(schema):
                value, make = values.get(field.name, MISSING), field.default_factory
                if value is MISSING and callable(make):
                    value = make()
                elif value is MISSING:
                    value = None if field.default is MISSING else field.default
                object.__setattr__(half, field.name, value)
            getattr(half, "__post_init__", lambda: None)()
        except Exception as error:
            for line in str(error).splitlines():
                if _named(line) in sound:
                    self.refusal(line, sound, path)

    def refusal(self, line: str, known: Collection[str], path: str) -> None:
        """Note a line that a dataclass refused its values with; ``length: 0; ...`` is about that field."""
        if _named(line) in known:
            key, _, line = line.partition(": ")
            path = _join(path, key)
        self.error(path, line, "")

    def field(self, raw: Mapping[str, Any], field: Field[Any], hint: Any, path: str) -> Any:
        """Build one field's value; MISSING where the dataclass has a default for it."""
        slot = field.metadata.get("slot")
        self.met_components |= bool(slot)
        if field.name in raw and not (slot and raw[field.name] is None):
            return self.value(raw[field.name], hint, path, slot)
        inner, optional = _unwrap(hint)
        if slot and get_origin(inner) in (list, dict):
            return get_origin(inner)()
        if slot and not optional:
            names = ", ".join(self.plugins.names(slot))
            return self.error(path, "missing", f"{a_component(slot)}, {{name: ...}}", f"Registered: {names}")
        if field.default is MISSING and field.default_factory is MISSING:
            return self.error(path, "missing", words(hint))
        default: Any = field.default_factory
        if is_dataclass(inner) and default is inner:  # its own fields may lack something too
            return self.dataclass({}, cast(type[Any], inner), path, what=field.name)
        return MISSING

    def value(self, raw: Any, hint: Any, path: str, slot: str | None) -> Any:
        """Build a value of a type: a component, a dataclass, a container of these, or a single value."""
        if path in self.unresolved:
            return None
        hint, optional = _unwrap(hint)
        if raw is None and optional:
            return None
        origin, args = get_origin(hint), get_args(hint)
        if hint is ComponentSpec and slot:
            return self.part(raw, slot, path)
        if isinstance(hint, type) and is_dataclass(hint):
            return self.dataclass(raw, hint, path, what=path.rpartition(".")[2])
        if args and _holds_dataclass(args[-1] if origin is dict else args[0]):
            if origin in (list, tuple) and isinstance(raw, list):
                items = [self.value(one, args[0], f"{path}[{i}]", slot) for i, one in enumerate(raw)]
                return tuple(items) if origin is tuple else items
            if origin is dict and isinstance(raw, Mapping):
                return {key: self.value(one, args[1], _join(path, key), slot) for key, one in raw.items()}
            return self.error(path, _found(raw), words(hint))
        try:
            return convert(raw, hint | None if optional else hint)
        except Exception as error:  # values of any form: OmegaConf's errors are not all of one class
            ours = type(error) is ValueError  # a number that nothing can be computed with
            return self.error(path, _found(raw), f"{words(hint)}: {error}" if ours else words(hint))

    def part(self, raw: Any, slot: str, path: str) -> ComponentSpec | None:
        """Build a component's options by the dataclass that it registered."""
        raw = {"name": raw} if isinstance(raw, str) else raw
        name = raw.get("name") if isinstance(raw, Mapping) else None
        if not isinstance(name, str):
            names = ", ".join(self.plugins.names(slot))
            return self.error(
                path, _found(raw), f"{a_component(slot)}, {{name: ...}}", f"Registered: {names}"
            )
        try:
            entry = self.plugins.entry(slot, name)
        except JanusError as error:
            return self.error(_join(path, "name"), str(error), "")
        options = {key: value for key, value in raw.items() if key != "name"}
        before = len(self.errors)
        config = self.dataclass(options, entry.config, path, what=f"the {slot_label(slot)} '{name}'")
        if slot not in MODEL_SLOTS:
            for key in ("pretrained", "revision"):
                if getattr(config, key, None) is not None and options.get(key) is not None:
                    self.error(
                        _join(path, key),
                        f"found {options[key]!r}",
                        "null",
                        f"{a_component(slot).capitalize()} has no weights to load: leave it out.",
                    )
        return ComponentSpec(slot, name, config) if len(self.errors) == before else None


def _found(raw: Any) -> str:
    return f"found {printable(repr(raw), most=200)}"


def _named(line: str) -> str | None:
    """Return the field that a line begins with: ``mixture`` of ``mixture.text: found -1``."""
    found = re.match(r"(\w+)[^\s:]*: ", line)
    return found and found[1]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """Take ``X | None`` apart: X, and whether None is allowed."""
    args = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType) and type(None) in args:
        rest = tuple(arg for arg in args if arg is not type(None))
        return (rest[0] if len(rest) == 1 else Union[rest]), True  # noqa: UP007 (built at run time)
    return hint, False


def _holds_dataclass(hint: Any) -> bool:
    inner = _unwrap(hint)[0]
    return (isinstance(inner, type) and is_dataclass(inner)) or any(map(_holds_dataclass, get_args(inner)))
