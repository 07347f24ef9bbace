"""A model that is small enough to be saved and loaded many times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import resolve
from janus_modular.config.schema import ModelConfig

Made = ModelAssembly


def tiny(**backbone: Any) -> dict[str, Any]:
    """The raw config of a model; ``backbone`` is a transformers config."""
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return {
        "understanding": {
            "encoder": {
                "name": "siglip",
                "feature_dim": 32,
                "layers": 2,
                "heads": 2,
                "intermediate": 64,
                "patch_size": 8,
                "image_size": 32,
                "pixels": {"height": 32, "width": 32},
            },
            "adaptor": "mlp",
        },
        "generation": {
            "name": "autoregressive",
            "height": 32,
            "width": 32,
            "tokenizer": {
                "name": "llamagen",
                "channels": 32,
                "channel_multipliers": [1, 1, 1, 1],
                "residual_blocks": 1,
                "latent_channels": 16,
                "num_codes": 64,
            },
            "adaptor": "mlp",
            "head": "mlp",
        },
        "backbone": {"name": "hf", "config": llama | backbone},
        "processor": {"tokenizer": "bytes", "template": "janus-pro"},
    }


@pytest.fixture
def make() -> Callable[..., Made]:
    """Make a random model with its processor; the same each time."""

    def build(**backbone: Any) -> Made:
        torch.manual_seed(0)
        assembly = ModelAssembly.from_config(resolve(tiny(**backbone), ModelConfig))
        assembly.model.eval()
        return assembly

    return build
