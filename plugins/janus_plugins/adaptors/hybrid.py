"""The adaptor `hybrid`, for encoders with two feature maps, of high and of low resolution.

The published code calls it ``low_high_hybrid_split_mlp_gelu``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from janus_modular import Adaptor, ComponentConfig, ConfigError, Registry, hookimpl


@dataclass
class HybridConfig(ComponentConfig):
    """Options of the adaptor."""

    depth: int = 2  # linear layers; the two input projections count as one


class HybridAdaptor(nn.Module):
    """Projects each map to D/2, joins them, high first, then GELU and Linear D -> D per further layer.

    A feature contains both maps, high then low: its dimension is 2C. The module names are the published
    ones: ``high_up_proj``, ``low_up_proj``, ``layers.1``, ``layers.3``, ...
    """

    def __init__(self, config: HybridConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        if input_dim % 2 or output_dim % 2:
            raise ConfigError(
                f"adaptor 'hybrid' splits its input in two and gives each half of the hidden size: "
                f"both must be even, not {input_dim} and {output_dim}"
            )
        if config.depth < 1:
            raise ConfigError(f"adaptor 'hybrid': depth must be at least 1, not {config.depth}")
        self.config = config
        self.high_up_proj = nn.Linear(input_dim // 2, output_dim // 2)
        self.low_up_proj = nn.Linear(input_dim // 2, output_dim // 2)
        layers: list[nn.Module] = []
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(output_dim, output_dim)]
        self.layers = nn.Sequential(*layers)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions: one for each feature."""
        return grid[0] * grid[1]

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features (N, P, 2C), high then low, to (N, P, D)."""
        high, low = features.chunk(2, dim=-1)  # (N, P, C) each
        joined = torch.cat([self.high_up_proj(high), self.low_up_proj(low)], dim=-1)  # (N, P, D)
        return self.layers(joined)


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("hybrid", HybridAdaptor, HybridConfig)
