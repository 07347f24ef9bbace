"""Single values: numbers, words, lists of them, as OmegaConf converts them."""

from __future__ import annotations

import types
from dataclasses import field, make_dataclass
from math import isfinite
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import MISSING, OmegaConf


def convert(value: Any, hint: Any) -> Any:
    """Return ``value`` as ``hint`` has it (``3`` where a float is asked for becomes ``3.0``).

    Raises:
        Exception: it cannot be; most of OmegaConf's are OmegaConfBaseException, not all.
        ValueError: a number is not finite, or a whole one beyond 64 bits; or a text holds NUL.
    """
    if hint is Any or (get_origin(hint) is dict and get_args(hint)[1] is Any and isinstance(value, dict)):
        return value  # a transformers config, say: passed on as it is
    holder = OmegaConf.structured(make_dataclass("Holder", [("value", hint, field(default=MISSING))]))
    OmegaConf.update(holder, "value", value)
    converted = OmegaConf.to_object(holder).value  # type: ignore[union-attr]
    _check_values(converted)
    _check_items(converted, hint)
    return converted


def _check_items(values: Any, hint: Any) -> None:
    """Refuse mappings and lists among the items of a list or tuple of single values; OmegaConf takes them."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next((arg for arg in get_args(hint) if get_origin(arg) in (list, tuple)), None)
    single = get_origin(hint) in (list, tuple) and get_args(hint)[0] in (str, int, float, bool)
    strange = [value for value in values or () if isinstance(value, dict | list)] if single else []
    if strange:
        raise ValueError(f"{str(strange[0])[:60]} is no single value")


def _check_values(value: Any) -> None:
    """Refuse numbers that nothing can be computed with, and texts that neither paths nor names can be.

    They would fail far from here, or not at all.
    """
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            _check_values(each)
    elif isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("the number takes more than 64 bits")
    elif isinstance(value, str) and "\0" in value:
        raise ValueError("the text holds the character NUL")


def words(hint: Any) -> str:
    """Say a type as people do: ``a number``, ``one of 'letterbox', 'crop'``, ``3 values, each a number``."""
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
