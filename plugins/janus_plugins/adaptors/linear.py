"""The adaptor `linear`: one linear layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from janus_modular import Adaptor, ComponentConfig, Registry, hookimpl


@dataclass
class LinearConfig(ComponentConfig):
    """Options of the adaptor."""

    bias: bool = True  # of the layer; JanusFlow's has one


class LinearAdaptor(nn.Module):
    """Maps features (N, P, C) to (N, P, D). JanusFlow's understanding path uses it."""

    def __init__(self, config: LinearConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.Linear(input_dim, output_dim, bias=config.bias)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions: one for each feature."""
        return grid[0] * grid[1]

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features (N, P, C) to (N, P, D)."""
        return self.layers(features)


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("linear", LinearAdaptor, LinearConfig)
