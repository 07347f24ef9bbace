"""The understanding encoder `lora`: low-rank adapters (LoRA) on any encoder.

understanding: {encoder: {name: lora, rank: 16, alpha: 32, encoder: {name: siglip, pretrained: FOLDER}}}

``learn: [understanding.encoder]`` trains the adapters alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from janus_modular import (
    ComponentSpec,
    PixelSpec,
    Registry,
    UnderstandingEncoder,
    component,
    hookimpl,
)
from janus_plugins.low_rank import AdapterOptions, LowRankAdapters

if TYPE_CHECKING:  # peft comes before torch: where both are missing, the error names the extra that has both
    from torch import Tensor


@dataclass
class LoraEncoderConfig(AdapterOptions):
    """The encoder that is adapted, with its own ``pretrained``, and options of LoRA."""

    encoder: ComponentSpec = component("understanding_encoders")  # with its own `pretrained`


class LoraEncoder(LowRankAdapters):
    """An understanding encoder with adapters in its linear layers. Built as ``factory(config, build)``."""

    wrapped = "encoder"
    encoder: Any

    def __init__(self, config: LoraEncoderConfig, build: Callable[[ComponentSpec], Any]) -> None:
        super().__init__(config, build(config.encoder))
        self.feature_dim: int = self.encoder.feature_dim
        self.pixels: PixelSpec = self.encoder.pixels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the adapted encoder's grid of features for an image of this size."""
        return self.encoder.grid(height, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C), through the adapted layers."""
        return self.encoder(pixels)


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Register adapters on any understanding encoder."""
    registry.add("lora", LoraEncoder, LoraEncoderConfig)
