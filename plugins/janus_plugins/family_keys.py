"""Whether a transformers config written by hand says what it means: its family, and its keys."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import signature
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

from janus_modular import ConfigError

log = logging.getLogger(__name__)

OLD_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor", "torch_dtype", "use_sliding_window"}
"""What transformers takes beside the keys that a family declares, or what published configs hold."""


def check_keys(keys: Mapping[str, Any]) -> None:
    """Refuse a family that transformers lacks, and keys that are misspelt: it would pass them over.

    Keys that resemble none of the family's come with configs from elsewhere; of these, a log line tells.

    Raises:
        ConfigError: says which was probably meant.
    """
    kind = str(keys["model_type"])
    if kind not in CONFIG_MAPPING:
        close = get_close_matches(kind, DECODERS, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "Known are llama, qwen3, gemma3_text ..."
        raise ConfigError(f"transformers {transformers.__version__} has no model_type '{kind}'. {hint}")
    family: Any = CONFIG_MAPPING[kind]
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
            raise ConfigError(f"backbone.config.{key}: '{kind}' has no such key. Did you mean '{close[0]}'?")
    if unknown:
        log.warning("backbone.config: '%s' has no keys %s; they change nothing", kind, ", ".join(unknown))
