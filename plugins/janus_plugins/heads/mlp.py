"""Janus' image head: hidden states to logits over the image tokenizer's codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from janus_modular import Head, PartConfig, Registry, hookimpl


@dataclass
class MlpHeadConfig(PartConfig):
    """How wide it is inside; the other widths are its neighbours'."""

    hidden: int | None = None  # None: as wide as the backbone, which is what Janus and Janus-Pro have


class MlpHead(nn.Module):
    """Linear D -> hidden, GELU (exact), Linear hidden -> K, with biases. The names are the published ones."""

    def __init__(self, config: MlpHeadConfig, width: int, num_codes: int) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden or width
        self.output_mlp_projector = nn.Linear(width, hidden)
        self.vision_activation = nn.GELU()
        self.vision_head = nn.Linear(hidden, num_codes)

    def forward(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (..., D) into code logits (..., K)."""
        return self.vision_head(self.vision_activation(self.output_mlp_projector(hidden)))


@hookimpl
def register_heads(registry: Registry[Head]) -> None:
    """Offer this head."""
    registry.add("mlp", MlpHead, MlpHeadConfig)
