"""The adaptor `linear`: one linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from janus_modular import Adaptor, ComponentConfig, Registry, hookimpl


@dataclass
class LinearConfig(ComponentConfig):
    """Options of the adaptor."""

    bias: bool = True  # of the layer; JanusFlow's has one
    begin: bool = False  # whether a learned embedding comes first, as in JanusFlow's understanding path


class LinearAdaptor(nn.Module):
    """Maps features (N, P, C) to (N, P', D). JanusFlow's understanding path uses it, with ``begin``."""

    def __init__(self, config: LinearConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Linear(input_dim, output_dim, bias=config.bias)
        self.begin = nn.Parameter(torch.randn(1, output_dim) * 0.02) if config.begin else None

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions: one for each feature, and one for ``begin``."""
        return grid[0] * grid[1] + self.config.begin

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features (N, P, C) to (N, P', D)."""
        x = self.layers(features)
        return x if self.begin is None else torch.cat([self.begin.expand(x.shape[0], 1, -1), x], dim=1)


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("linear", LinearAdaptor, LinearConfig)
