"""The backbone `lora`: low-rank adapters (LoRA) on any backbone.

backbone: {name: lora, rank: 16, alpha: 32, backbone: {name: hf, pretrained: FOLDER}}

``learn: [backbone]`` trains the adapters alone; the path of a submodule (``backbone.backbone.model.lm_head``)
trains that submodule. ``export`` and ``convert --merge`` merge the adapters into the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from janus_modular import (
    AttendsTogether,
    Backbone,
    Cache,
    ChecksPacking,
    ComponentSpec,
    DeclaresCache,
    DeclaresPositions,
    MasksPositions,
    Registry,
    ReturnsLayer,
    RowCache,
    component,
    hookimpl,
)
from janus_plugins.low_rank import AdapterOptions, LowRankAdapters, logit_layers

if TYPE_CHECKING:  # peft comes before torch: where both are missing, the error names the extra that has both
    from torch import Tensor


@dataclass
class LoraConfig(AdapterOptions):
    """The backbone that is adapted, with its own ``pretrained``, and options of LoRA."""

    backbone: ComponentSpec = component("backbones")  # with its own `pretrained`


class LoraBackbone(LowRankAdapters):
    """A backbone with adapters in its linear layers, except those that compute logits.

    Built as ``factory(config, build)``.
    """

    wrapped = "backbone"
    backbone: Any

    def __init__(self, config: LoraConfig, build: Callable[[ComponentSpec], Any]) -> None:
        backbone = build(config.backbone)
        super().__init__(config, backbone, excluded=logit_layers(backbone))
        self.hidden_size: int = self.backbone.hidden_size
        self.context: int = self.backbone.context
        if isinstance(self.backbone, DeclaresCache):
            self.cache_tensors = self.backbone.cache_tensors
        if isinstance(self.backbone, DeclaresPositions):
            self.position_axes = self.backbone.position_axes

    @property
    def vocab_size(self) -> int:
        """The wrapped backbone's vocabulary size."""
        return self.backbone.vocab_size

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up token ids (B, T) as (B, T, D)."""
        return self.backbone.embed(tokens)

    @property
    def num_layers(self) -> int:
        """The number of layers that the wrapped backbone returns the states of; 0 if it returns none."""
        return self.backbone.num_layers if isinstance(self.backbone, ReturnsLayer) else 0

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        cache: Cache | None = None,
        together: Tensor | None = None,
        hidden: Tensor | None = None,
        layer: int | None = None,
    ) -> Any:
        """Turn embeddings (B, T, D) into hidden states (B, T, D), through the adapted layers.

        With ``layer``, return these and the states after so many layers.
        """
        options = {"together": together, "hidden": hidden, "layer": layer}
        chosen = {name: value for name, value in options.items() if value is not None}
        return self.backbone(x, positions=positions, cache=cache, **chosen)

    @property
    def masks_positions(self) -> bool:
        """True if the wrapped backbone hides positions."""
        return isinstance(self.backbone, MasksPositions) and self.backbone.masks_positions

    def refuse_together(self) -> str:
        """Return why the wrapped backbone does not support bidirectional blocks; "" if it does."""
        if isinstance(self.backbone, AttendsTogether):
            return self.backbone.refuse_together()
        return f"'{self.config.backbone.name}', which it adapts, is causal: choose another backbone"

    def refuse_packing(self) -> str:
        """Return why the wrapped backbone does not keep packed sequences apart; "" if it does."""
        return self.backbone.refuse_packing() if isinstance(self.backbone, ChecksPacking) else ""

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (..., D) into text logits (..., V); these layers have no adapters."""
        return self.backbone.logits(hidden)

    def new_cache(self, rows: int, max_seq_len: int) -> RowCache:
        """Return an empty cache of the wrapped backbone."""
        return self.backbone.new_cache(rows, max_seq_len)

    def resize_vocab(self, vocab_size: int) -> None:
        """Grow the wrapped backbone's vocabulary; new embeddings train only if a stage names the table."""
        self.backbone.resize_vocab(vocab_size)


@hookimpl
def register_backbones(registry: Registry[Backbone]) -> None:
    """Register adapters on any backbone."""
    registry.add("lora", LoraBackbone, LoraConfig)
