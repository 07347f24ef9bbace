"""The adaptor that changes nothing: for an encoder whose features are already as wide as the backbone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from janus_modular import Adaptor, ComponentConfig, ConfigError, Registry, hookimpl


@dataclass
class IdentityConfig(ComponentConfig):
    """The identity has no options."""


class IdentityAdaptor(nn.Module):
    """Hands features (N, P, C) on as they are; C must be D.

    Raises:
        ConfigError: the widths differ.
    """

    def __init__(self, config: IdentityConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        if input_dim != output_dim:
            raise ConfigError(
                f"adaptor 'identity' cannot join features of width {input_dim} to a backbone of width "
                f"{output_dim}: choose 'linear' or 'mlp', or equal widths"
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
