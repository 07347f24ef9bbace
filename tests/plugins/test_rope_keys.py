"""Old and new config keys of rotary embeddings, and other keys of which one overrides another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from janus_modular import ConfigError, DescriptionError
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_plugins.backbones.hf import HfBackbone, HfConfig

TINY = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
THETA = {"rope_type": "default", "rope_theta": 7e5}


def saved(folder: Path, **keys: Any) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY, **keys})).save_pretrained(folder)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"rope_theta": 5.0}, {"rope_type": "default", "rope_theta": 5.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {**LINEAR, "rope_theta": 7e5}),
        ({"rope_scaling": None}, THETA),
        ({"rope_parameters": LINEAR}, {**LINEAR, "rope_theta": 7e5}),
    ],
)
def test_overrides_by_older_keys_replace_what_they_name(
    written: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    saved(tmp_path, model_type="llama", rope_parameters=dict(THETA))
    described = HfBackbone(HfConfig(pretrained=str(tmp_path), config_overrides=written))
    ours = HfBackbone(HfConfig(config=described.config.config)).model.model.rotary_emb.inv_freq
    theirs = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, rope_parameters=dict(expected)))
    torch.testing.assert_close(ours, theirs.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_theta": 5.0}, r"config.rope_theta is 5.0, but 700000.0 would be used"),
        ({"rope_scaling": {"type": "default"}}, r"rope_parameters.rope_theta is 700000.0, but 10000.0 would"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7e5},
            r"rope_type is 'linear'",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {**THETA, **LINEAR}},
            r"is 'default', but 'line",
        ),
        (
            {"model_type": "gpt_neox", "rope_theta": 5.0, "rope_parameters": None},
            r"5.0, but 10000.0",
        ),
        ({"model_type": "gpt2", "n_embd": 16}, r"hidden_size is 32 and n_embd 16, two names of one value"),
    ],
)
def test_two_keys_of_one_value_are_refused_if_they_differ(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HfBackbone(HfConfig(config={**TINY, "model_type": "llama", "rope_parameters": dict(THETA), **keys}))


def test_two_keys_of_one_value_are_compared_with_the_folder(tmp_path: Path) -> None:
    keys = {"rope_theta": 7e5, "rope_scaling": None, "rope_parameters": dict(THETA)}
    HfBackbone(HfConfig(config={**TINY, "model_type": "llama", **keys}))
    saved(tmp_path, model_type="llama", rope_parameters=dict(THETA))
    HfBackbone(HfConfig(pretrained=str(tmp_path), config=keys))
    with pytest.raises(DescriptionError, match=r"config.rope_theta: found 5.0, expected 700000.0"):
        HfBackbone(HfConfig(pretrained=str(tmp_path), config={**keys, "rope_theta": 5.0}))


def test_overrides_derive_the_types_of_layers_anew(tmp_path: Path) -> None:
    window = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    saved(tmp_path, **window)
    overrides = {"max_window_layers": 0}
    backbone = HfBackbone(HfConfig(pretrained=str(tmp_path), config_overrides=overrides))
    expected = AutoConfig.for_model(**{**TINY, **window, **overrides}).layer_types
    assert backbone.model.config.layer_types == expected == ["sliding_attention"] * 2
    edited = json.loads((tmp_path / "config.json").read_text()) | {"layer_types": ["full_attention"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"layer_types would be derived from max_window_layers.*Write"):
        HfBackbone(HfConfig(pretrained=str(tmp_path), config_overrides=overrides))


def test_an_override_of_a_checkpoint_is_not_dropped(tmp_path: Path) -> None:
    save(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)), tmp_path)
    with pytest.raises(ConfigError, match=r"backbone.config.rope_theta is 5.0, but 10000.0 would be used"):
        ModelAssembly.from_checkpoint(tmp_path, overrides=["backbone.config.rope_theta=5.0"])
    present = ["backbone.config.rope_parameters.rope_theta=5.0"]
    backbone: Any = ModelAssembly.from_checkpoint(tmp_path, overrides=present, device="meta").model.backbone
    assert backbone.model.config.rope_parameters["rope_theta"] == 5.0
