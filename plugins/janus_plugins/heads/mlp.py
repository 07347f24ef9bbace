"""Janus' image head: hidden states to logits over the image tokenizer's codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from janus_modular import ComponentConfig, ConfigError, Head, Registry, hookimpl


@dataclass
class MlpHeadConfig(ComponentConfig):
    """Options of the head."""

    hidden: int | None = None  # hidden dimension; None: the backbone's, as in Janus and Janus-Pro


class MlpHead(nn.Module):
    """Linear D -> hidden, GELU (exact), Linear hidden -> K, with biases. The names are the published ones.

    Raises:
        ConfigError: a position has several codes, and each depends on those before it.
    """

    def __init__(self, config: MlpHeadConfig, hidden_size: int, codebooks: tuple[int, ...]) -> None:
        super().__init__()
        if len(codebooks) != 1:
            raise ConfigError(
                f"head 'mlp' predicts one code a position, but the tokenizer has {len(codebooks)}, of "
                f"{codebooks}: choose a head for several, or a tokenizer with one"
            )
        self.config = config
        self.codebooks: tuple[int, ...] = codebooks
        hidden = config.hidden or hidden_size
        self.output_mlp_projector = nn.Linear(hidden_size, hidden)
        self.vision_activation = nn.GELU()
        self.vision_head = nn.Linear(hidden, codebooks[0])

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Turn hidden states (..., D) into logits (..., K) of a position's only code."""
        return self.vision_head(self.vision_activation(self.output_mlp_projector(hidden)))


@hookimpl
def register_heads(registry: Registry[Head]) -> None:
    """Register this head."""
    registry.add("mlp", MlpHead, MlpHeadConfig)
