"""Checks a config against dataclasses, key by key, and builds them; all errors are collected first."""

from __future__ import annotations

import re
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from janus_modular.config.config_types import check_config_type
from janus_modular.config.errors import FieldError, config_error
from janus_modular.config.interpolation import interpolate
from janus_modular.config.scalars import convert, words
from janus_modular.errors import JanusError, MissingExtraError
from janus_modular.foreign import printable, reason
from janus_modular.interfaces import ComponentSpec
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.registry import MODEL_SLOTS, a_component, slot_label
from janus_modular.suggest import did_you_mean, new_name

T = TypeVar("T")


def resolve(
    raw: Mapping[str, Any], schema: type[T], plugins: Plugins | None = None, *, subject: str = "the config"
) -> T:
    """Return ``raw`` as an instance of the dataclass ``schema``, its components as `ComponentSpec`s.

    ``subject``: what an error says to be wrong.

    Raises:
        ConfigError: lists every error with its path, what was expected and a hint; or ``raw`` is a config
            of another type.
    """
    check_config_type(raw, schema)
    tree, errors = interpolate(dict(raw))
    walk = _Walk(plugins or default_plugins(), errors)
    instance = walk.dataclass(tree, schema, "", label=schema.__name__)
    if walk.errors:
        inside = tuple(f"{path}{end}" for path in walk.component_paths for end in (".", "["))
        of_components = any(f"{error.path}.".startswith(inside) for error in walk.errors)
        raise config_error(walk.errors, of_components=of_components, subject=subject)
    return cast(T, instance)


class _Walk:
    """Walks through a config and builds its values; an invalid value is recorded as an error and is None."""

    def __init__(self, plugins: Plugins, errors: list[FieldError]) -> None:
        self.plugins = plugins
        self.errors = errors
        self.unresolved = {error.path for error in errors}
        self.component_paths: list[str] = []  # of fields that hold components, or several

    def error(self, path: str, problem: str, expected: str, hint: str = "") -> Any:
        """Record an error; return None in the place of the value that could not be built."""
        self.errors.append(FieldError(path, problem, expected, hint))

    def dataclass(
        self, raw: Any, schema: type[Any], path: str, *, label: str, further: Sequence[str] = ()
    ) -> Any:
        """Build ``schema`` from a mapping; ``label`` names its owner in errors.

        ``further``: keys that are allowed beside the fields, and were read already.
        """
        if not isinstance(raw, Mapping):
            return self.error(path, _describe(raw), f"a mapping (key: value) for {label}")
        before, unresolved = len(self.errors), False
        known = {field.name: field for field in fields(schema) if field.init}
        try:
            type_hints = get_type_hints(schema)
        except Exception as error:
            return self.error(
                path, f"{label} has annotations that cannot be read: {error}", "", "Tell its author."
            )
        allowed = [*further, *known]
        for key in raw:
            if key not in allowed:
                self.error(
                    _join(path, key),
                    "unknown key",
                    f"one of {', '.join(allowed)}",
                    new_name(str(key), known)
                    or _key_hint(str(key), type_hints)
                    or did_you_mean(str(key), allowed),
                )
        values, valid = {}, set[str]()
        for name, field in known.items():
            count = len(self.errors)
            values[name] = self.field(raw, field, type_hints[name], _join(path, name))
            if _join(path, name) in self.unresolved:
                values[name], unresolved = MISSING, True
            elif len(self.errors) > count and values[name] is None:
                values[name] = MISSING
            elif len(self.errors) == count and name in raw:
                valid.add(name)
        if len(self.errors) > before or unresolved:
            return self.check_valid_fields(schema, values, path, valid)
        try:
            return schema(**{name: value for name, value in values.items() if value is not MISSING})
        except Exception as error:  # raised by __post_init__
            message = str(error) if isinstance(error, ValueError | TypeError | JanusError) else reason(error)
            for line in message.splitlines():
                self.schema_error(line, known, path)
            return None

    def check_valid_fields(
        self, schema: type[Any], values: dict[str, Any], path: str, valid: set[str]
    ) -> None:
        """Record the errors that ``__post_init__`` raises about the ``valid`` fields of a faulty config.

        The other fields hold their defaults or None, which may be the reason of an error: only lines that
        begin with the name of a valid field count.
        """
        partial = object.__new__(schema)
        try:
            for field in fields(schema):
                value, make = values.get(field.name, MISSING), field.default_factory
                if value is MISSING and callable(make):
                    value = make()
                elif value is MISSING:
                    value = None if field.default is MISSING else field.default
                object.__setattr__(partial, field.name, value)
            getattr(partial, "__post_init__", lambda: None)()
        except Exception as error:
            for line in str(error).splitlines():
                if _field_of(line) in valid:
                    self.schema_error(line, valid, path)

    def schema_error(self, line: str, known: Collection[str], path: str) -> None:
        """Record a line of a dataclass's own error; ``length: 0; ...`` is about the field ``length``."""
        if _field_of(line) in known:
            key, _, line = line.partition(": ")
            path = _join(path, key)
        self.error(path, line, "")

    def field(self, raw: Mapping[str, Any], field: Field[Any], type_hint: Any, path: str) -> Any:
        """Build one field's value; MISSING where the dataclass has a default for it."""
        slot = field.metadata.get("slot")
        if slot:
            self.component_paths.append(path)
        if field.name in raw and not (slot and raw[field.name] is None):
            return self.value(raw[field.name], type_hint, path, slot)
        inner, optional = _unwrap(type_hint)
        if slot and get_origin(inner) in (list, dict):
            return get_origin(inner)()
        if slot and not optional:
            names = ", ".join(self.plugins.names(slot))
            return self.error(path, "missing", f"{a_component(slot)}, {{name: ...}}", f"Registered: {names}")
        if field.default is MISSING and field.default_factory is MISSING:
            return self.error(path, "missing", words(type_hint))
        default: Any = field.default_factory
        if is_dataclass(inner) and default is inner:  # its fields may be required
            return self.dataclass({}, cast(type[Any], inner), path, label=field.name)
        return MISSING

    def value(self, raw: Any, type_hint: Any, path: str, slot: str | None) -> Any:
        """Build a value of a type: a component, a dataclass, a container of these, or a single value."""
        if path in self.unresolved:
            return None
        type_hint, optional = _unwrap(type_hint)
        if raw is None and optional:
            return None
        origin, args = get_origin(type_hint), get_args(type_hint)
        if type_hint is ComponentSpec and slot:
            return self.component(raw, slot, path)
        if isinstance(type_hint, type) and is_dataclass(type_hint):
            return self.dataclass(raw, type_hint, path, label=path.rpartition(".")[2])
        if args and _holds_dataclass(args[-1] if origin is dict else args[0]):
            if origin in (list, tuple) and isinstance(raw, list):
                items = [self.value(item, args[0], f"{path}[{i}]", slot) for i, item in enumerate(raw)]
                return tuple(items) if origin is tuple else items
            if origin is dict and isinstance(raw, Mapping):
                if args[1] is ComponentSpec and slot:
                    return {
                        key: self.component(item, slot, _join(path, key), _named(raw, besides=key))
                        for key, item in raw.items()
                    }
                return {key: self.value(item, args[1], _join(path, key), slot) for key, item in raw.items()}
            return self.error(path, _describe(raw), words(type_hint))
        try:
            return convert(raw, type_hint | None if optional else type_hint)
        except Exception as error:  # values of any form: OmegaConf's errors are not all of one class
            own = type(error) is ValueError  # raised by `convert` itself: its text says what is wrong
            return self.error(
                path, _describe(raw), f"{words(type_hint)}: {error}" if own else words(type_hint)
            )

    def component(self, raw: Any, slot: str, path: str, siblings: Sequence[str] = ()) -> ComponentSpec | None:
        """Build a component's options with the dataclass that it registered.

        ``siblings``: the keys of complete components beside it, one of which may have been meant.
        """
        raw = {"name": raw} if isinstance(raw, str) else raw
        name = raw.get("name") if isinstance(raw, Mapping) else None
        if not isinstance(name, str):
            names = ", ".join(self.plugins.names(slot))
            problem, hint = _describe(raw), f"Registered: {names}"
            if isinstance(raw, Mapping) and raw and "name" not in raw:
                problem = f"found options without a name: {', '.join(map(str, raw))}"
                condition = f" if none of {', '.join(siblings)} was meant" if siblings else ""
                hint = f"Add `name`{condition}. {hint}"
            return self.error(path, problem, f"{a_component(slot)}, {{name: ...}}", hint)
        try:
            entry = self.plugins.entry(slot, name)
        except MissingExtraError as error:
            self.errors.append(FieldError(_join(path, "name"), error.need, "", extras=error.extras))
            return None
        except JanusError as error:
            return self.error(_join(path, "name"), str(error), "")
        options = {key: value for key, value in raw.items() if key != "name"}
        before, label = len(self.errors), f"the {slot_label(slot)} '{name}'"
        config = self.dataclass(options, entry.config, path, label=label, further=("name",))
        if slot not in MODEL_SLOTS:
            for key in ("pretrained", "revision"):
                if getattr(config, key, None) is not None and options.get(key) is not None:
                    self.error(
                        _join(path, key),
                        f"found {options[key]!r}",
                        "null",
                        f"{a_component(slot).capitalize()} has no weights to load: leave it out.",
                    )
        return ComponentSpec(slot, name, config, path) if len(self.errors) == before else None


def _describe(raw: Any) -> str:
    return f"found {printable(repr(raw), most=200)}"


def _field_of(line: str) -> str | None:
    """Return the field that a line begins with: ``mixture`` of ``mixture.text: found -1``."""
    match = re.match(r"(\w+)[^\s:]*: ", line)
    return match and match[1]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _unwrap(type_hint: Any) -> tuple[Any, bool]:
    """Return X and True for ``X | None``, any other type and False."""
    args = get_args(type_hint)
    if get_origin(type_hint) in (Union, types.UnionType) and type(None) in args:
        rest = tuple(arg for arg in args if arg is not type(None))
        return (rest[0] if len(rest) == 1 else Union[rest]), True  # noqa: UP007 (built at run time)
    return type_hint, False


def _holds_dataclass(type_hint: Any) -> bool:
    inner = _unwrap(type_hint)[0]
    return (isinstance(inner, type) and is_dataclass(inner)) or any(map(_holds_dataclass, get_args(inner)))


def _key_hint(key: str, type_hints: Mapping[str, Any]) -> str:
    """Return a hint where a key is one of a field's own keys, such as ``model.understanding``; else ""."""
    for name, hint in type_hints.items():
        for member in (hint, *get_args(hint)):
            if is_dataclass(member) and key in {field.name for field in fields(member)}:
                return f"Did you mean '{name}.{key}'?"
    return ""


def _named(raw: Mapping[str, Any], besides: str) -> list[str]:
    """Return the keys of values that name a component, but for one."""
    return [
        str(key)
        for key, item in raw.items()
        if key != besides and (isinstance(item, str) or (isinstance(item, Mapping) and "name" in item))
    ]
