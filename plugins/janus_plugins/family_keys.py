"""Whether a transformers config written by hand says what it means: its family, and its keys."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from janus_modular import ConfigError

log = logging.getLogger(__name__)

OLD_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "use_sliding_window"}
"""What transformers takes beside the keys that a family declares, or what published configs hold."""


def check_keys(keys: Mapping[str, Any], where: str, families: Iterable[str]) -> None:
    """Refuse a family that transformers lacks, and keys that are misspelt: it would pass them over.

    Keys that resemble none of the family's come with configs from elsewhere; of these, a log line tells.
    ``where`` is what the keys are called in a config file, ``families`` what may be meant, best known first.

    Raises:
        ConfigError: says which was probably meant.
    """
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
