"""Converts single values (numbers, texts, booleans, and lists of these) as OmegaConf does."""

from __future__ import annotations

import types
from dataclasses import field, make_dataclass
from functools import lru_cache
from math import isfinite
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING, OmegaConf


def convert(value: Any, hint: Any) -> Any:
    """Return ``value`` converted to the type ``hint`` (``3`` becomes ``3.0`` for a float).

    Raises:
        Exception: the value cannot be converted; OmegaConf's errors have no common class.
        ValueError: a number is not finite, an integer needs more than 64 bits, or a text holds NUL.
    """
    if hint is Any or (get_origin(hint) is dict and get_args(hint)[1] is Any and isinstance(value, dict)):
        return value  # a transformers config, say: passed on unchanged
    if type(value) in (str, int, bool, type(None)):
        return _converted_once(value, hint)
    return _converted(value, hint)


@lru_cache(maxsize=4096)
def is_convertible(hint: Any) -> bool:
    """Return True if `convert` knows a type: a number, a text, or a list of these, but no function."""
    try:
        OmegaConf.structured(_holder(hint))
    except Exception:  # OmegaConf's errors have no common class
        return False
    return True


def _converted(value: Any, hint: Any) -> Any:
    holder = OmegaConf.structured(_holder(hint))
    OmegaConf.update(holder, "value", value)
    converted = OmegaConf.to_object(holder).value  # type: ignore[union-attr]
    _check_values(converted)
    _check_items(converted, hint)
    return converted


_converted_once = lru_cache(maxsize=4096, typed=True)(_converted)  # a conversion takes 0.2 ms


@lru_cache(maxsize=4096)
def _holder(hint: Any) -> type:
    return make_dataclass("Holder", [("value", hint, field(default=MISSING))])


def _check_items(values: Any, hint: Any) -> None:
    """Raise ValueError for a mapping or list inside a list of single values, which OmegaConf would accept."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next((arg for arg in get_args(hint) if get_origin(arg) in (list, tuple)), None)
    single = get_origin(hint) in (list, tuple) and get_args(hint)[0] in (str, int, float, bool)
    nested = [value for value in values or () if isinstance(value, dict | list)] if single else []
    if nested:
        raise ValueError(f"{str(nested[0])[:60]} is no single value")


def _check_values(value: Any) -> None:
    """Raise ValueError for numbers that are not finite or need over 64 bits, and for texts that hold NUL.

    Without this check they would fail later, far from the config, or go unnoticed.
    """
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_values(item)
    elif isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("the number takes more than 64 bits")
    elif isinstance(value, str) and "\0" in value:
        raise ValueError("the text holds the character NUL")


def words(hint: Any) -> str:
    """Return a type in plain words: ``a number``, ``one of 'fit', 'crop'``, ``3 values, each a number``."""
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Any: "anything"}
    if hint in plain:
        return plain[hint]
    if hint is type(None):
        return "null"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join(words(arg) for arg in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each {words(args[0])}"
    if origin is tuple:
        return f"{len(args)} values, each {' or '.join(dict.fromkeys(map(words, args)))}"
    if origin is dict:
        return f"a mapping (key: value), each {words(args[1])}"
    return "a mapping (key: value)" if hint is dict else getattr(hint, "__name__", str(hint))
