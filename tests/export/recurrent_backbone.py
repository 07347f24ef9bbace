"""A plugin with a backbone without attention: each layer keeps one state of a gated linear recurrence.

A head's state S (K, V) follows from its keys, values and decays: S_t = a_t S_(t-1) + k_t v_t^T, and is read
by q_t: y_t = q_t^T S_t ("Gated linear attention transformers with hardware-efficient training", with one
decay a head). It is computed for many positions at once, from the decays between each two positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    Backbone,
    Cache,
    ComponentConfig,
    Registry,
    StateCache,
    TensorCache,
    TensorSpec,
    hookimpl,
)


@dataclass
class RecurrentConfig(ComponentConfig):
    """Sizes."""

    vocab_size: int = 320
    hidden_size: int = 32
    layers: int = 2
    heads: int = 2
    head_dim: int = 8
    context: int = 640


class Recurrence(nn.Module):
    """One layer."""

    def __init__(self, config: RecurrentConfig, name: str) -> None:
        super().__init__()
        self.name, self.heads, width = name, config.heads, config.heads * config.head_dim
        self.norm = nn.LayerNorm(config.hidden_size)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.decay = nn.Linear(config.hidden_size, config.heads)
        self.output = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: StateCache | None) -> Tensor:
        """Add the recurrence's output to x (B, T, D)."""
        normed = self.norm(x)
        q, k, v = self.query_key_value(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        log_decay = F.logsigmoid(self.decay(normed)).transpose(1, 2)  # (B, H, T)
        if cache is not None:  # padding changes nothing: a decay of 1, and nothing is added
            kept = cache.kept(x.shape[1])[:, None]  # (B, 1, T)
            log_decay = log_decay * kept
            k = k * kept.unsqueeze(-1)
        index = torch.arange(x.shape[1], device=x.device)
        causal = index[:, None] >= index  # (T, S)
        begun = (causal & (positions == 0)[:, None]).sum(-1)[:, None]  # (B, 1, T): sequences, up to t
        since = log_decay @ causal.T.to(x.dtype)  # (B, H, T): the decays up to t, summed
        decays = (since.unsqueeze(-1) - since.unsqueeze(-2)).clamp(max=0).exp()  # (B, H, T, S)
        seen = causal & (begun.unsqueeze(-1) == begun.unsqueeze(-2))
        weights = torch.where(seen, decays, torch.zeros_like(decays))
        y = (q @ k.transpose(-1, -2) * weights) @ v  # (B, H, T, V)
        if cache is not None:
            old = cache.read(self.name)  # (B, H, K, V)
            carried = torch.where(begun == 0, since.exp(), torch.zeros_like(since)).unsqueeze(-1)
            y = y + carried * (q @ old)
            new = (k * weights[:, :, -1:].transpose(-1, -2)).transpose(-1, -2) @ v
            cache.write(self.name, carried[:, :, -1:] * old + new)
        return x + self.output(y.transpose(1, 2).flatten(2))


class RecurrentBackbone(nn.Module):
    """Token embeddings, which are the logits' weights too, and layers of recurrences."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size, self.context = config.hidden_size, config.context
        shape = ("rows", config.heads, config.head_dim, config.head_dim)
        self.cache_tensors = [TensorSpec(f"state_{i}", "model", shape) for i in range(config.layers)]
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Recurrence(config, spec.name) for spec in self.cache_tensors)
        self.norm = nn.LayerNorm(config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.table.weight.shape[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up tokens (B, T) as (B, T, D)."""
        return self.table(tokens)

    def forward(self, x: Tensor, *, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Turn embeddings (B, T, D) into hidden states (B, T, D)."""
        for layer in self.layers:
            x = layer(x, positions, cast(StateCache, cache))
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (..., D) into logits (..., V)."""
        return F.linear(hidden, self.table.weight)

    def new_cache(self, rows: int, max_seq_len: int) -> TensorCache:
        """Return an empty cache of the declared tensors."""
        weight = self.table.weight
        return TensorCache(
            rows, max_seq_len, device=weight.device, dtype=weight.dtype, tensors=self.cache_tensors
        )

    def resize_vocab(self, vocab_size: int) -> None:
        """Grow to ``vocab_size`` tokens."""
        if (more := vocab_size - self.vocab_size) > 0:
            rows = self.table.weight.data.mean(0).expand(more, -1)
            self.table = nn.Embedding.from_pretrained(torch.cat([self.table.weight.data, rows]), freeze=False)
            self.config.vocab_size = vocab_size


@hookimpl
def register_backbones(registry: Registry[Backbone]) -> None:
    """Register the backbone."""
    registry.add("recurrent", RecurrentBackbone, RecurrentConfig)
