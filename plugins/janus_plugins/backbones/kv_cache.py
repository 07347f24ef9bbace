"""The KV cache of transformers' decoders, and the attention that reads rows of different lengths from it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ConfigError, TensorCache

attention_modules: ContextVar[set[nn.Module] | None] = ContextVar("attention_modules", default=None)
"""While it holds a set, modules that call `cached_attention` are added to it."""


class KVCache(TensorCache):
    """A cache that a transformers decoder fills through ``update``; a `janus_modular.RowCache`."""

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the longest length; transformers calls it, but given positions take precedence."""
        return int(self.lengths.max())


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend from query (B, H, T, w) to entries (B, kv heads, S, w) under a mask (B, 1, T, S).

    With a prepared mask, transformers does not make its own, so the sliding window is applied here: a query
    attends to itself and the ``sliding_window - 1`` entries before it.
    """
    if (modules := attention_modules.get()) is not None:
        modules.add(module)
    for name in ("s_aux", "position_bias"):
        if unused.get(name) is not None:
            raise ConfigError(
                f"{type(module).__name__} passes '{name}' to its attention, which sessions do not support"
            )
    if sliding_window:
        query_index = attention_mask.sum(-1, keepdim=True) - 1  # a query's mask ends at its own entry
        entries = torch.arange(key.shape[2], device=key.device)
        attention_mask = attention_mask & (entries > query_index - sliding_window)
    groups = query.shape[1] // key.shape[1]
    if softcap is None:
        x = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=groups > 1
        )
    else:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~attention_mask, float("-inf"))
        x = scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value
    return x.transpose(1, 2).contiguous(), None  # (B, T, H, w)
