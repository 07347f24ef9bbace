"""Checks transformers configs: the family, unknown keys, and invalid values."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import getfile, signature
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from janus_modular import ConfigError
from janus_plugins.hf_rope_keys import COMMON_ROPE_KEYS

log = logging.getLogger(__name__)

OLD_KEYS = {"torch_dtype", "use_sliding_window"}
"""Keys that published configs contain beside those that a family declares."""

SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "patch_size", "image_size",
)  # fmt: skip
"""Numbers that are at least 1 in every family; some models can be built with less, but compute nothing."""

ROPE_NUMBERS = ("rope_theta", "factor")
ROPE_SHARES = ("partial_rotary_factor", "rotary_pct")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Check sizes, parameters of rotary embeddings and epsilons.

    transformers builds models with most invalid values; their states are NaN, or they have no layers.

    Raises:
        ConfigError: lists every invalid key; ``where`` is the path of the keys in the user's config.
    """
    rope = values.get("rope_parameters") or {}
    by_layer = {f"rope_parameters.{name}": v for name, v in rope.items() if isinstance(v, Mapping)}
    wrong = [
        *_outside(values, SIZES, "at least 1", lambda number: number >= 1),
        *_outside(values, EPSILONS, "a finite number, at least 0", lambda number: 0 <= number < math.inf),
    ]
    for path, numbers in {"": values, "rope_parameters": rope, **by_layer}.items():
        errors = _outside(
            numbers, ROPE_NUMBERS, "a finite number above 0", lambda number: 0 < number < math.inf
        )
        errors += _outside(numbers, ROPE_SHARES, "a number above 0, at most 1", lambda share: 0 < share <= 1)
        wrong += [f"{path}.{text}".lstrip(".") for text in errors]
    if wrong:
        raise ConfigError(f"{where}: {'; '.join(wrong)}")


def _outside(
    values: Mapping[str, Any], keys: Iterable[str], expected: str, allows: Callable[[float], bool]
) -> list[str]:
    """Return an error text for each key with a number, alone or in a list, that is not allowed."""
    wrong = []
    for key in keys:
        value = values.get(key)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(allows(number) for number in numbers if isinstance(number, int | float)):
            wrong.append(f"{key} is {value}; expected {expected}")
    return wrong


@contextmanager
def naming_settings(family: Any, where: str) -> Iterator[None]:
    """Name the config key because of which transformers cannot build a model; its own errors do not.

    Raises:
        ConfigError: the body raised a KeyError (an activation is unknown) or a ZeroDivisionError.
    """
    try:
        yield
    except (KeyError, ZeroDivisionError) as error:
        values = family.to_dict()
        names = [key for key in ACTIVATIONS if isinstance(error, KeyError) and values.get(key) in error.args]
        if names:
            close = get_close_matches(str(error.args[0]), ACT2FN, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(ACT2FN)}."
            raise ConfigError(
                f"{where}.{names[0]}: transformers has no activation {error.args[0]!r}. {hint}"
            ) from error
        zeros = [key for key, value in values.items() if type(value) in (int, float) and value == 0]
        reason = f"lacks a key {error}" if isinstance(error, KeyError) else "divides by 0"
        hint = (
            f". Keys that are 0: {', '.join(zeros)}" if zeros and isinstance(error, ZeroDivisionError) else ""
        )
        raise ConfigError(f"{where}: transformers' '{family.model_type}' {reason}{hint}") from error


def check_keys(
    keys: Mapping[str, Any], where: str, families: Iterable[str], part: PreTrainedConfig | None = None
) -> None:
    """Check the family of a config, and its keys, of which transformers would ignore unknown ones.

    An unknown key that is similar to a known one is an error; the others are logged as a warning. ``where``
    is the path of the keys in the user's config, ``families`` are suggestions, best known first. Keys may
    also be those of ``part``, the part that is used of a larger model.

    Raises:
        ConfigError: the family or a key is unknown, or a value is invalid.
    """
    check_values(keys, where)
    model_type = str(keys["model_type"])
    if model_type not in CONFIG_MAPPING:
        families = list(dict.fromkeys(families))
        close = get_close_matches(model_type, families, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(families[:3])} ..."
        raise ConfigError(f"transformers {transformers.__version__} has no model_type '{model_type}'. {hint}")
    own = {key: value for key, value in keys.items() if not hasattr(part, key)}
    _check(own, where, model_type, CONFIG_MAPPING[model_type])


def _check(keys: Mapping[str, Any], where: str, model_type: str, family: Any) -> None:
    """Check keys against a family's config class, nested configs against theirs."""
    for name, sub_config in family.sub_configs.items():
        nested = keys.get(name)
        if isinstance(nested, Mapping):
            nested_type = nested.get("model_type", getattr(sub_config, "model_type", ""))
            if nested_type in CONFIG_MAPPING:
                _check(nested, f"{where}.{name}", nested_type, CONFIG_MAPPING[nested_type])
    for alias, name in family.attribute_map.items():
        if alias in keys and name in keys and keys[alias] != keys[name]:
            raise ConfigError(
                f"{where}: {alias} is {keys[alias]!r} and {name} {keys[name]!r}, two names of one value for"
                f" '{model_type}'. Write one of them."
            )
    known = {*signature(family).parameters, *family.attribute_map, *OLD_KEYS}
    rotates = hasattr(family, "rope_parameters")
    inherited = set() if rotates else COMMON_ROPE_KEYS  # by every family, also those without such embeddings
    known |= COMMON_ROPE_KEYS if rotates else set()
    unknown = [key for key in keys if key not in known and (key in inherited or not hasattr(family, key))]
    if unknown:  # keys that a family derives from others
        try:
            known |= vars(family()).keys()
        except StrictDataclassError:
            return  # its defaults are not valid, so its keys cannot be listed
    unknown = [key for key in unknown if key not in known and not key.startswith("_")]
    for key in unknown:
        if close := get_close_matches(key, known, n=1, cutoff=0.85):
            raise ConfigError(f"{where}.{key}: '{model_type}' has no such key. Did you mean '{close[0]}'?")
    if unknown := [key for key in unknown if not _is_read(key, family)]:
        log.warning("%s: '%s' has no keys %s; they change nothing", where, model_type, ", ".join(unknown))


def _is_read(key: str, family: Any) -> bool:
    """Return True if the source of a family reads a key that its config class does not declare.

    Many models read ``getattr(config, "head_dim", default)``, and some configs older names from ``kwargs``.
    """
    read = re.compile(rf'(?:getattr\((?:self\.)?config,|kwargs\.(?:get|pop)\()\s*"{re.escape(key)}"')
    folder = Path(getfile(family)).parent
    files = [*folder.glob("modeling_*.py"), *folder.glob("configuration_*.py")]
    return any(read.search(file.read_text("utf-8")) for file in files)
