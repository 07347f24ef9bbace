"""The adaptor `lora`: low-rank adapters (LoRA) on any adaptor.

understanding: {adaptor: {name: lora, rank: 16, alpha: 32, adaptor: {name: mlp}}}

``learn: [understanding.adaptor]`` trains the adapters alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from janus_modular import Adaptor, ComponentSpec, Registry, ReshapesGrid, component, hookimpl
from janus_plugins.low_rank import AdapterOptions, LowRankAdapters

if TYPE_CHECKING:  # peft comes before torch: where both are missing, the error names the extra that has both
    from torch import Tensor


@dataclass
class LoraAdaptorConfig(AdapterOptions):
    """The adaptor that is adapted, with its own ``pretrained``, and options of LoRA."""

    adaptor: ComponentSpec = component("adaptors")  # with its own `pretrained`


class LoraAdaptor(LowRankAdapters):
    """An adaptor with low-rank adapters in its linear layers."""

    wrapped = "adaptor"
    adaptor: Any

    def __init__(
        self, config: LoraAdaptorConfig, input_dim: int, output_dim: int, build: Callable[..., Any]
    ) -> None:
        super().__init__(config, build(config.adaptor, input_dim, output_dim))
        if isinstance(self.adaptor, ReshapesGrid):
            self.output_grid = self.adaptor.output_grid

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions that the wrapped adaptor makes of a grid of features."""
        return self.adaptor.num_tokens(grid)

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project features (N, P, C) to embeddings (N, P', D), through the adapted layers."""
        return self.adaptor(features, grid)


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register low-rank adapters on any adaptor."""
    registry.add("lora", LoraAdaptor, LoraAdaptorConfig)
