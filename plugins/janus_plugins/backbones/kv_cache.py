"""A KV cache whose rows have different lengths, and the attention that reads it.

transformers' caches have one length for all rows. Here, row r writes its next positions at ``lengths[r]``,
without padding, and attends to the entries up to its own position. Entries beyond a row's length are masked,
and overwritten later.
"""

from __future__ import annotations

from contextvars import ContextVar
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ConfigError, PromptError

attention_modules: ContextVar[set[nn.Module] | None] = ContextVar("attention_modules", default=None)
"""While it holds a set, modules that call `cached_attention` are added to it."""


class KVCache:
    """A cache that a transformers decoder fills through ``update``; a `janus_modular.RowCache`.

    One entry behind the last position is never attended to: padding beyond ``max_seq_len`` is written there.
    """

    def __init__(self, rows: int, max_seq_len: int, device: torch.device) -> None:
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.max_seq_len = max_seq_len
        self.device = device
        self.total_rows, self.rows = rows, slice(None)
        self.parent: KVCache | None = None  # of a selection
        self.keys: dict[int, Tensor] = {}  # by layer: (all rows, kv heads, max_seq_len + 1, head_dim)
        self.values: dict[int, Tensor] = {}
        self.end = 0  # longest row, with the positions of this forward pass
        self.index = torch.empty(0)

    def begin(self, tokens: int) -> Tensor:
        """Choose the entries of ``tokens`` more positions; return their attention mask (B, 1, T, S)."""
        index = self.lengths[:, None] + torch.arange(tokens)  # (B, T)
        self.end = int(self.lengths.max()) + tokens
        if self.end > self.max_seq_len:
            index, self.end = index.clamp(max=self.max_seq_len), self.max_seq_len + 1
        self.index = index.to(self.device)
        entries = torch.arange(self.end, device=self.device)
        return (entries <= self.index[:, :, None]).unsqueeze(1)  # (B, 1, T, S)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values (B, heads, T, head_dim); return those of all positions so far."""
        return self._write(self.keys, keys, layer), self._write(self.values, values, layer)

    def _write(self, store: dict[int, Tensor], new: Tensor, layer: int) -> Tensor:
        if layer not in store:
            _, heads, _, head_dim = new.shape
            store[layer] = new.new_zeros(self.total_rows, heads, self.max_seq_len + 1, head_dim)
        entries = store[layer] if self.parent is None else store[layer][self.rows]
        entries.scatter_(2, self.index[:, None, :, None].expand_as(new), new)
        return entries[:, :, : self.end]

    def advance(self, counts: Tensor) -> None:
        """Keep the first ``counts`` (B,) of the positions written last.

        Raises:
            PromptError: a row would hold more than ``max_seq_len``.
        """
        lengths = self.lengths + counts.cpu()
        if (end := int(lengths.max())) > self.max_seq_len:
            raise PromptError(
                f"{end} positions do not fit into a session of {self.max_seq_len}: shorten the prompt, ask"
                " for fewer tokens, or open the session with a larger max_seq_len"
            )
        self.truncate(lengths)

    def truncate(self, lengths: Tensor) -> None:
        """Cut rows back to ``lengths`` (B,); what lay behind them is overwritten."""
        self.lengths = lengths.cpu()
        if self.parent is not None:
            lengths_of_all = self.parent.lengths.clone()
            lengths_of_all[self.rows] = self.lengths
            self.parent.lengths = lengths_of_all

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` entries of a row to another row; its own length does not change."""
        for store in (self.keys, self.values):
            for entries in store.values():
                entries[target, :, :length] = entries[source, :, :length]

    def select(self, rows: slice) -> KVCache:
        """Return a cache of consecutive rows alone, over the same memory."""
        selected = copy(self)  # shallow: both have the same tensors, those that are allocated later too
        selected.rows, selected.lengths, selected.parent = rows, self.lengths[rows], self
        return selected

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
