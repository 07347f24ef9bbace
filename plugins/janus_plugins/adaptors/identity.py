"""The adaptor that changes nothing: for an encoder whose features already have the hidden size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from janus_modular import Adaptor, ComponentConfig, ConfigError, Registry, hookimpl


@dataclass
class IdentityConfig(ComponentConfig):
    """The identity has no options."""


class IdentityAdaptor(nn.Module):
    """Returns features (N, P, C) unchanged; C must be D.

    Raises:
        ConfigError: C is not D.
    """

    def __init__(self, config: IdentityConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        if input_dim != output_dim:
            raise ConfigError(
                f"adaptor 'identity' maps {input_dim} to {output_dim} dimensions, which must be equal:"
                " choose 'linear' or 'mlp'"
            )
        self.config = config

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions: one for each feature."""
        return grid[0] * grid[1]

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features (N, P, D) unchanged."""
        return features


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("identity", IdentityAdaptor, IdentityConfig)
