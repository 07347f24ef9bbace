"""Values of a transformers config that no model can have are refused by their key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from janus_modular import CheckpointError, ConfigError
from janus_plugins.backbones.hf import HfBackbone, HfConfig
from janus_plugins.hf_folders import read_config
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig, HfVisionEncoder

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 32,
}
DINO: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LOCAL = {"full_attention": {"rope_type": "default", "rope_theta": 0.0}}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_theta": 0}, r"config: rope_theta is 0; expected a finite number above 0"),
        ({"rope_theta": -10000.0}, r"rope_theta is -10000\.0; expected a finite number above 0"),
        ({"rope_theta": float("inf")}, r"rope_theta is inf; expected a finite number above 0"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.0, "rope_theta": 1e4}},
            r"s\.factor is 0\.0",
        ),
        ({"model_type": "gemma3_text", "rope_parameters": LOCAL}, r"full_attention\.rope_theta is 0\.0"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; expected at least 1"),
        ({"num_hidden_layers": -1, "head_dim": 0}, r"num_hidden_layers is -1; .*; head_dim is 0;"),
        ({"rms_norm_eps": -1e-6}, r"rms_norm_eps is -1e-06; expected a finite number, at least 0"),
        ({"hidden_act": "sulu"}, r"config\.hidden_act: transformers has no activation 'sulu'\. Did you mean"),
        ({"model_type": "qwen3", "hidden_act": 3}, r"hidden_act.* 3"),
    ],
)
def test_a_decoder(keys: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        HfBackbone(HfConfig(config={**LLAMA, **keys}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "nope"}, r"config\.hidden_act: transformers has no activation 'nope'"),
        ({"num_attention_heads": 0}, r"config: num_attention_heads is 0; expected at least 1"),
        ({"patch_size": 0}, r"config: patch_size is 0; expected at least 1"),
        ({"layer_norm_eps": float("nan")}, r"config: layer_norm_eps is nan; expected a finite number"),
        ({"image_size": [28, 0]}, r"config: image_size is \[28, 0\]; expected at least 1"),
    ],
)
def test_a_vision_model(keys: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        HfVisionEncoder(HfVisionConfig(config={**DINO, **keys}))


def test_overrides_of_what_a_folder_describes(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(DINO))
    config = HfVisionConfig(pretrained=str(tmp_path), config_overrides={"hidden_act": "nope"})
    with pytest.raises(ConfigError, match="transformers has no activation 'nope'"):
        HfVisionEncoder(config)


def test_a_folder_that_describes_what_cannot_be(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_attention_heads": 0}))
    with pytest.raises(CheckpointError, match="holds no config of a decoder"):
        read_config(tmp_path, "a decoder")
