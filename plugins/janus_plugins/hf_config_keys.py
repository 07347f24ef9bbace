"""Whether a transformers config says what it means: its family, keys, and values that no model has."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.activations import ACT2FN

from janus_modular import ConfigError

log = logging.getLogger(__name__)

OLD_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "use_sliding_window"}
"""What transformers takes beside the keys that a family declares, or what published configs hold."""

SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "patch_size", "image_size",
)  # fmt: skip
"""Numbers that are at least 1 in every family; with 0 or less some models are built, and compute nothing."""

ROPE_NUMBERS = ("rope_theta", "factor", "partial_rotary_factor")
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Refuse sizes below 1, rotary embeddings without finite frequencies, and negative epsilons.

    transformers builds models of most of these; their states are NaN, or they have no layers.

    Raises:
        ConfigError: names every such key; ``where`` is what the keys are called in a config file.
    """
    rope = values.get("rope_parameters") or {}
    by_layer = {f"rope_parameters.{name}": one for name, one in rope.items() if isinstance(one, Mapping)}
    wrong = [
        *_outside(values, SIZES, "at least 1", lambda number: number >= 1),
        *_outside(values, EPSILONS, "a finite number, at least 0", lambda number: 0 <= number < math.inf),
    ]
    for path, numbers in {"": values, "rope_parameters": rope, **by_layer}.items():
        found = _outside(
            numbers, ROPE_NUMBERS, "a finite number above 0", lambda number: 0 < number < math.inf
        )
        wrong += [f"{path}.{text}".lstrip(".") for text in found]
    if wrong:
        raise ConfigError(f"{where}: {'; '.join(wrong)}")


def _outside(
    values: Mapping[str, Any], keys: Iterable[str], expected: str, allows: Callable[[float], bool]
) -> list[str]:
    """Return a text for each of some keys whose numbers, alone or in a list, are not allowed."""
    wrong = []
    for key in keys:
        value = values.get(key)
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(allows(number) for number in numbers if isinstance(number, int | float)):
            wrong.append(f"{key} is {value}; expected {expected}")
    return wrong


@contextmanager
def naming_settings(family: Any, where: str) -> Iterator[None]:
    """Name the key of a config by which transformers cannot build a model: its own errors name none.

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
            meant = f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(ACT2FN)}."
            raise ConfigError(
                f"{where}.{names[0]}: transformers has no activation {error.args[0]!r}. {meant}"
            ) from error
        zeros = [key for key, value in values.items() if type(value) in (int, float) and value == 0]
        reason = f"lacks a key {error}" if isinstance(error, KeyError) else "divides by 0"
        hint = (
            f". Keys that are 0: {', '.join(zeros)}" if zeros and isinstance(error, ZeroDivisionError) else ""
        )
        raise ConfigError(f"{where}: transformers' '{family.model_type}' {reason}{hint}") from error


def check_keys(keys: Mapping[str, Any], where: str, families: Iterable[str]) -> None:
    """Refuse a family that transformers lacks, and keys that are misspelt: it would pass them over.

    Keys that resemble none of the family's come with configs from elsewhere; of these, a log line tells.
    ``where`` is what the keys are called in a config file, ``families`` what may be meant, best known first.

    Raises:
        ConfigError: says which was probably meant, or which value no model can have.
    """
    check_values(keys, where)
    kind = str(keys["model_type"])
    if kind not in CONFIG_MAPPING:
        families = list(families)
        close = get_close_matches(kind, families, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known are {', '.join(families[:3])} ..."
        raise ConfigError(f"transformers {transformers.__version__} has no model_type '{kind}'. {hint}")
    _check(keys, where, kind, CONFIG_MAPPING[kind])


def _check(keys: Mapping[str, Any], where: str, kind: str, family: Any) -> None:
    """Compare keys with those of a family's config class, and what they hold for its parts with theirs."""
    for name, part in family.sub_configs.items():
        inside = keys.get(name)
        if isinstance(inside, Mapping):
            named = inside.get("model_type", getattr(part, "model_type", ""))
            if named in CONFIG_MAPPING:
                _check(inside, f"{where}.{name}", named, CONFIG_MAPPING[named])
    known = {*signature(family).parameters, *family.attribute_map, *OLD_KEYS}
    unknown = [key for key in keys if key not in known and not hasattr(family, key)]
    if unknown:  # a family may work keys out from others, and then writes them too
        try:
            known |= vars(family()).keys()
        except StrictDataclassError:
            return  # its defaults do not make a decoder: nobody knows what its keys are
    unknown = [key for key in unknown if key not in known and not key.startswith("_")]
    for key in unknown:
        if close := get_close_matches(key, known, n=1, cutoff=0.85):
            raise ConfigError(f"{where}.{key}: '{kind}' has no such key. Did you mean '{close[0]}'?")
    if unknown:
        log.warning("%s: '%s' has no keys %s; they change nothing", where, kind, ", ".join(unknown))
