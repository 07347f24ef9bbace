"""Checks settings of a sampler against the annotations of their dataclass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from math import isfinite
from types import GenericAlias, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from janus_modular.config.errors import FieldError
from janus_modular.config.scalars import convert, is_convertible, words
from janus_modular.foreign import printable

MAX_TEXT = 200
"""Characters of a text that is given to OmegaConf, which keeps what it converted."""


def check_settings(schema: type[Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[FieldError]]:
    """Return settings, each converted to its field's type as in a config, and errors of those that are not.

    Numbers and arrays of NumPy are taken as Python's. Whole numbers may have more than 64 bits. Texts are
    taken as they are: nothing is interpolated. A field with an annotation that no config can have (a
    function, an array) takes any value.
    """
    hints = _type_hints(schema)  # type: ignore[arg-type]  # mypy takes no class for hashable
    converted, errors = dict(settings), []
    for name, value in settings.items():
        if name not in hints:
            continue
        try:
            converted[name] = _converted(value, hints[name])
        except Exception as error:  # values of any form: OmegaConf's errors are not all of one class
            expected = words(hints[name])
            own = type(error) is ValueError  # raised by `convert` itself: its text says what is wrong
            problem = f"found {printable(repr(value), most=80)}"
            errors.append(FieldError(name, problem, f"{expected}: {error}" if own else expected))
    for field in fields(schema):
        required = field.init and field.default is MISSING and field.default_factory is MISSING
        if required and field.name not in settings:
            errors.append(FieldError(field.name, "missing", words(hints.get(field.name, Any))))
    return converted, errors


@cache
def _type_hints(schema: type[Any]) -> dict[str, Any]:
    """Return the types of fields that can be checked; a sequence of any class is checked as a tuple."""
    try:
        hints = get_type_hints(schema)
    except Exception:  # annotations that only type checkers can read
        return {}
    for name, hint in hints.items():
        if get_origin(hint) is Sequence:
            hints[name] = GenericAlias(tuple, (*get_args(hint), ...))
    return {name: hint for name, hint in hints.items() if is_convertible(hint)}


def _has_type(value: Any, hint: Any) -> bool:
    """Return True if a value is of a type as it is, and finite, so that nothing is to be converted."""
    if type(value) is float and not isfinite(value):
        return False
    if isinstance(hint, type) and not get_args(hint):
        return type(value) is hint
    if get_origin(hint) in (Union, UnionType):
        return any(_has_type(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return type(value) is tuple and all(_has_type(item, get_args(hint)[0]) for item in value)
    return False


def _converted(value: Any, hint: Any) -> Any:
    if _has_type(value, hint):
        return value
    value = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if type(value) is int and int in (hint, *get_args(hint)) and get_origin(hint) is not tuple:
        return value
    if isinstance(value, range):
        value = tuple(value)
    if hint == tuple[Any, ...] and isinstance(value, list | tuple):
        return value
    plain = _plain(value)
    result = convert(plain, hint)
    return result if plain == value else value


def _plain(value: Any) -> Any:
    """Return a value in which texts that OmegaConf would interpolate, or that are long, are replaced."""
    if isinstance(value, str):
        safe = len(value) <= MAX_TEXT and "$" not in value and "?" not in value
        return value if safe else "a text\0" if "\0" in value else "a text"
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    return value
