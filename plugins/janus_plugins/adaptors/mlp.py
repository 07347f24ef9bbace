"""The adaptor `mlp`, Janus' own: an MLP from the encoder's feature_dim to the backbone's hidden size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from janus_modular import Adaptor, ComponentConfig, ConfigError, Registry, hookimpl


@dataclass
class MlpConfig(ComponentConfig):
    """Options of the adaptor."""

    depth: int = 2  # linear layers: C -> D, then D -> D; Janus and Janus-Pro have 2


class MlpAdaptor(nn.Module):
    """Linear C -> D, then GELU (exact) and Linear D -> D for each further layer.

    The keys are the published ones: ``layers.0``, ``layers.2``, ...
    """

    def __init__(self, config: MlpConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        if config.depth < 1:
            raise ConfigError(f"adaptor 'mlp': depth must be at least 1, not {config.depth}")
        self.config = config
        layers: list[nn.Module] = [nn.Linear(input_dim, output_dim)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(output_dim, output_dim)]
        self.layers = nn.Sequential(*layers)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions: one for each feature."""
        return grid[0] * grid[1]

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features (N, P, C) to (N, P, D)."""
        return self.layers(features)


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("mlp", MlpAdaptor, MlpConfig)
