"""An image tokenizer as understanding encoder: one shared VQ encoder, the baseline of Janus' ablation.

The paper's thesis is that reading and drawing want encoders of their own (Janus, table 5); this is
the other side of that comparison.
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
    """Which tokenizer, and the images it reads."""

    tokenizer: ComponentSpec = component(
        "image_tokenizers"
    )  # e.g. the drawing path's, with the same `pretrained`
    height: int = 384  # pixels
    width: int = 384  # pixels
    resize: Literal["letterbox", "crop", "stretch"] = "letterbox"  # as in PixelSpec

    def __post_init__(self) -> None:
        """Refuse sizes that no image has."""
        check_sizes(self, height=1, width=1)


class TokenizerFeatures(nn.Module):
    """The vectors of an image's codes as its features (N, P, C); C is the width of a code.

    Built as ``factory(config, build)``. Choosing a code has no gradient: the tokenizer stays as it is.
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
        mean, std = -low / (high - low), 1 / (high - low)  # (x - mean) / std carries [0, 1] to the range
        self.pixels = PixelSpec(
            height=config.height,
            width=config.width,
            resize=config.resize,
            mean=(mean, mean, mean),
            std=(std, std, std),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """As many as the tokenizer has positions."""
        return self.tokenizer.grid(height, width)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) in the tokenizer's range into the vectors of their codes (N, P, C)."""
        vectors = self.tokenizer.codebook_embeddings()
        assert vectors is not None  # its codes have a width
        codes = self.tokenizer.encode(pixels)  # (N, P), or (N, P, S)
        if len(self.tokenizer.codebooks) > 1:  # each counts from 0; vectors lie one codebook after another
            starts = [0, *accumulate(self.tokenizer.codebooks[:-1])]
            codes = torch.stack([codes[..., s] + start for s, start in enumerate(starts)], dim=-1)
        return vectors[codes].flatten(2)  # (N, P, C), of S codes side by side


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Offer this encoder."""
    registry.add("tokenizer-features", TokenizerFeatures, TokenizerFeaturesConfig)
