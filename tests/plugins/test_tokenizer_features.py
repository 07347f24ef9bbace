"""The shared-encoder baseline: features are the vectors of the tokenizer's own codes."""

from __future__ import annotations

import pytest
import torch

from janus_modular import ComponentSpec, ConfigError
from janus_plugins.image_tokenizers.llamagen import LlamaGenConfig, LlamaGenTokenizer
from janus_plugins.understanding_encoders.tokenizer_features import TokenizerFeatures, TokenizerFeaturesConfig

TINY = LlamaGenConfig(
    channels=8, channel_multipliers=[1, 2], residual_blocks=1, latent_channels=8, num_codes=16, code_dim=4
)


def encoder_of(tokenizer: LlamaGenTokenizer) -> TokenizerFeatures:
    config = TokenizerFeaturesConfig(
        tokenizer=ComponentSpec("image_tokenizers", "llamagen", TINY), height=8, width=12
    )
    return TokenizerFeatures(config, lambda part: tokenizer)


def test_features_are_the_vectors_of_the_codes() -> None:
    tokenizer = LlamaGenTokenizer(TINY).eval()
    encoder = encoder_of(tokenizer)
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1

    features = encoder(pixels)

    assert (encoder.feature_dim, encoder.grid(8, 12)) == (4, (4, 6))
    torch.testing.assert_close(features, tokenizer.codebook_embeddings()[tokenizer.encode(pixels)])


def test_its_normalisation_carries_images_to_the_tokenizers_range() -> None:
    tokenizer = LlamaGenTokenizer(TINY)
    tokenizer.value_range = (-0.5, 2.0)
    spec = encoder_of(tokenizer).pixels

    assert (spec.height, spec.width, spec.normalize) == (8, 12, True)
    assert ((0 - spec.mean[0]) / spec.std[0], (1 - spec.mean[0]) / spec.std[0]) == pytest.approx((-0.5, 2.0))


def test_codes_without_vectors_are_refused() -> None:
    tokenizer = LlamaGenTokenizer(TINY)
    tokenizer.code_dim = None
    with pytest.raises(ConfigError, match="needs codes with vectors"):
        encoder_of(tokenizer)
