"""The understanding encoder `tokenizer-features`: an image tokenizer, the baseline of Janus' ablation.

Janus' thesis is that understanding and generation need separate encoders (Janus, table 5); this encoder is
the shared one of that comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from janus_modular import (
    ComponentConfig,
    ComponentSpec,
    ConfigError,
    ImageTokenizer,
    PixelSpec,
    Registry,
    UnderstandingEncoder,
    component,
    hookimpl,
)
from janus_plugins.sizes import check_sizes


@dataclass
class TokenizerFeaturesConfig(ComponentConfig):
    """The tokenizer, and the image size."""

    tokenizer: ComponentSpec = component(
        "image_tokenizers"
    )  # e.g. the drawing path's, with the same `pretrained`
    height: int = 384  # pixels
    width: int = 384  # pixels
    resize: Literal["letterbox", "crop", "stretch"] = "letterbox"  # as in PixelSpec

    def __post_init__(self) -> None:
        """Check the image size."""
        check_sizes(self, height=1, width=1)


class TokenizerFeatures(nn.Module):
    """Returns the embeddings of an image's codes as features (N, P, C); C is code_dim times codes a position.

    Built as ``factory(config, build)``. Quantisation has no gradient here, so the tokenizer is not trained.
    """

    def __init__(self, config: TokenizerFeaturesConfig, build: Callable[[ComponentSpec], Any]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer: ImageTokenizer = build(config.tokenizer)
        if self.tokenizer.code_dim is None:
            raise ConfigError(
                f"tokenizer-features needs codes with vectors, and those of '{config.tokenizer.name}' have "
                "none: choose a tokenizer with a codebook, such as vq or llamagen"
            )
        self.feature_dim = self.tokenizer.code_dim * len(self.tokenizer.codebooks)
        low, high = self.tokenizer.value_range
        mean, std = -low / (high - low), 1 / (high - low)  # (x - mean) / std maps [0, 1] to the range
        self.pixels = PixelSpec(
            height=config.height,
            width=config.width,
            resize=config.resize,
            mean=(mean, mean, mean),
            std=(std, std, std),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the tokenizer's positions."""
        return self.tokenizer.grid(height, width)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) in the tokenizer's range into embeddings of codes (N, P, C)."""
        embeddings = self.tokenizer.codebook_embeddings()
        assert embeddings is not None  # code_dim is not None
        codes = self.tokenizer.encode(pixels)  # (N, P), or (N, P, S)
        if len(self.tokenizer.codebooks) > 1:  # ids of each codebook count from 0
            starts = [0, *accumulate(self.tokenizer.codebooks[:-1])]
            codes = torch.stack([codes[..., s] + start for s, start in enumerate(starts)], dim=-1)
        return embeddings[codes].flatten(2)  # (N, P, C)


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Register this encoder."""
    registry.add("tokenizer-features", TokenizerFeatures, TokenizerFeaturesConfig)
