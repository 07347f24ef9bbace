"""The head `lora`: low-rank adapters (LoRA) on any head.

generation: {head: {name: lora, rank: 16, alpha: 32, head: {name: mlp}}}

``learn: [generation.head]`` trains the adapters alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from janus_modular import ComponentSpec, Head, Registry, component, hookimpl
from janus_plugins.low_rank import AdapterOptions, LowRankAdapters

if TYPE_CHECKING:  # peft comes before torch: where both are missing, the error names the extra that has both
    from torch import Tensor


@dataclass
class LoraHeadConfig(AdapterOptions):
    """The head that is adapted, with its own ``pretrained``, and options of LoRA."""

    head: ComponentSpec = component("heads")  # with its own `pretrained`


class LoraHead(LowRankAdapters):
    """A head with low-rank adapters in its linear layers."""

    wrapped = "head"
    head: Any

    def __init__(
        self,
        config: LoraHeadConfig,
        hidden_size: int,
        codebooks: tuple[int, ...],
        build: Callable[..., Any],
    ) -> None:
        super().__init__(config, build(config.head, hidden_size, codebooks))
        self.codebooks: tuple[int, ...] = self.head.codebooks

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Return logits (..., K) for hidden states (..., D), through the adapted layers."""
        return self.head(hidden, before)


@hookimpl
def register_heads(registry: Registry[Head]) -> None:
    """Register low-rank adapters on any head."""
    registry.add("lora", LoraHead, LoraHeadConfig)
