"""The transformers config of the backbone `hf`: written, described beside its weights, or both."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

from janus_modular import ConfigError, quantization_in, resolve_pretrained
from janus_plugins.hf_config_keys import check_keys
from janus_plugins.hf_folders import (
    check_described,
    is_described,
    read_config,
    refuse_adapters,
    text_part,
    with_overrides,
)
from janus_plugins.hf_rope_keys import refuse_overruled

if TYPE_CHECKING:
    from janus_plugins.backbones.hf import HfConfig


def decoder_config(config: HfConfig) -> PreTrainedConfig:
    """Return the decoder's transformers config: the one beside the weights, or that of ``config``.

    Raises:
        ConfigError: there is no config, transformers rejects it, or the weights have another one.
        CheckpointError: the weights are quantised, or the config beside them cannot be read.
    """
    path = resolve_pretrained(config.pretrained, config.revision) if config.pretrained else None
    if path:
        refuse_adapters(path)
    described = read_config(path, "a decoder") if path and (is_described(path) or not config.config) else None
    if config.config_overrides and described is None:
        raise ConfigError("backbone.config_overrides change what pretrained describes; here, write config")
    if config.config:
        written = written_config(config.config, described)
        family = described or written
        if described is not None and path is not None:
            check_described(config.config, [described, text_part(described)], path)
    elif described is not None:
        family = described
    else:
        raise ConfigError(
            "give backbone.config (transformers' keys) or backbone.pretrained (a folder, a file, a hub id)"
        )
    assert family is not None
    built = with_overrides(text_part(family), config.config_overrides, "backbone.config_overrides")
    where = f"{path}: config.json" if path else "backbone.config"
    refuse_overruled(built.to_diff_dict(), built, where)
    return built


def written_config(keys: dict[str, Any], described: PreTrainedConfig | None) -> PreTrainedConfig | None:
    """Check the keys that a user wrote; return their config, or None if the described config is built."""
    keys = dict(keys)
    if "model_type" not in keys and described is None:
        raise ConfigError(
            "backbone.config has no model_type: write one that transformers knows, such as llama"
        )
    for where, _ in quantization_in(keys):
        raise ConfigError(
            f"backbone.config.{where}: quantised layers can be neither trained nor saved here; leave it out,"
            " and name unquantised weights"
        )
    # The processor looks up these ids by string; a family's defaults may not be in the vocabulary.
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    keys.setdefault("model_type", described and described.model_type)
    part = text_part(described) if described else None
    check_keys(keys, "backbone.config", ["llama", "qwen3", "gemma3_text", *DECODERS], part)
    if described is not None:
        return None
    try:
        family = AutoConfig.for_model(**{**no_ids, **copy.deepcopy(keys)})
    except StrictDataclassError as error:
        raise ConfigError(f"transformers refuses backbone.config: {error}") from error
    refuse_overruled(keys, text_part(family), "backbone.config")
    return family
