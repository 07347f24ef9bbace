"""Every understanding encoder: declared feature_dim and number of features are true at any image size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from janus_modular import UnderstandingEncoder
from janus_modular.config import resolve
from janus_modular.config.schema import UnderstandingConfig
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.weights.loading import load_weights, parameters_on_meta

EXAMPLE = Path(__file__).parents[2] / "plugins" / "examples" / "efficientnet_lite0.py"
HF = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "patch_size": 8,
}  # fmt: skip
PIXELS = {"height": 32, "width": 32}
ENCODERS: dict[str, dict[str, Any]] = {
    "siglip": {
        "name": "siglip", "feature_dim": 16, "layers": 2, "heads": 2, "intermediate": 20, "patch_size": 8,
        "image_size": 32, "pixels": PIXELS,
    },
    "siglip2": {
        "name": "hf-vision", "config": {"model_type": "siglip2_vision_model", "num_patches": 16, **HF},
    },
    "clip": {"name": "hf-vision", "config": {"model_type": "clip_vision_model", "image_size": 32, **HF}},
    "dinov2": {"name": "hf-vision", "config": {"model_type": "dinov2", "image_size": 32, **HF}},
    "tokenizer": {
        "name": "tokenizer-features", "height": 32, "width": 32,
        "tokenizer": {
            "name": "llamagen", "channels": 8, "channel_multipliers": [1, 2], "residual_blocks": 1,
            "latent_channels": 8, "num_codes": 16, "code_dim": 4,
        },
    },
    "efficientnet": {"name": "efficientnet-lite0", "height": 32, "width": 32},
}  # fmt: skip


@pytest.fixture
def build(plugins: Plugins) -> ModelBuilder:
    plugins.add_file(EXAMPLE)
    return ModelBuilder(plugins)


def encoder_of(build: ModelBuilder, name: str) -> UnderstandingEncoder:
    torch.manual_seed(0)
    raw = {"encoder": ENCODERS[name], "adaptor": "identity"}
    config = resolve(raw, UnderstandingConfig, build.plugins)
    encoder: UnderstandingEncoder = build(config.encoder).eval()
    return encoder


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_features_are_as_many_and_as_wide_as_claimed(
    build: ModelBuilder, name: str, size: tuple[int, int]
) -> None:
    encoder = encoder_of(build, name)

    features = encoder(torch.randn(2, 3, *size))

    assert features.shape == (2, math.prod(encoder.grid(*size)), encoder.feature_dim)
    assert features.isfinite().all()
    assert (encoder.pixels.height, encoder.pixels.width) == (32, 32)


@torch.inference_mode()
@pytest.mark.parametrize("name", ENCODERS)
def test_built_without_memory_and_filled_it_is_the_same(build: ModelBuilder, name: str) -> None:
    encoder = cast(nn.Module, encoder_of(build, name))
    with parameters_on_meta():
        again = cast(nn.Module, encoder_of(build, name))

    load_weights(again, encoder.state_dict().items()).check(name)

    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(pixels), encoder(pixels))
