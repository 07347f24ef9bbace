"""The head `factorized`, Open-MAGVIT2's: predicts several codes a position, each given those before it.

A vocabulary of 2^18 is too large for one softmax. Codes of 6 and 12 bits need two small ones, and a short
transformer over the codes of a position models their dependence (Luo et al. 2024, section 3.2:
"intra-block"). Its input is the backbone's hidden state, then the embeddings of the codes before; its last
state predicts the next code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ComponentConfig, Head, Registry, hookimpl
from janus_plugins.sizes import check_heads, check_sizes


@dataclass
class FactorizedHeadConfig(ComponentConfig):
    """Options of the head; the defaults are those of the published L model."""

    layers: int = 3  # transformer blocks over the codes of a position
    heads: int | None = None  # of attention; None: D / 64
    hidden: int | None = None  # of the feed-forward layers; None: 8/3 D, up to a multiple of 256

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(self, layers=1)
        check_sizes(self, **{name: 1 for name in ("heads", "hidden") if getattr(self, name) is not None})


class FactorizedHead(nn.Module):
    """Maps hidden states and the codes before to logits of the next code.

    The head has an embedding table for each code of a position except the last; as tables differ, position
    embeddings are not needed. With one code a position, it is a deep head on single states.
    """

    def __init__(self, config: FactorizedHeadConfig, dim: int, codebooks: tuple[int, ...]) -> None:
        super().__init__()
        self.config = config
        self.codebooks = codebooks
        heads = config.heads or max(1, dim // 64)
        check_heads(dim, heads)
        hidden = config.hidden or -(-8 * dim // (3 * 256)) * 256
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in codebooks[:-1])
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden) for _ in range(config.layers)))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.outputs = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in codebooks)
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Map hidden states (..., D) and the codes (..., s) before to logits (..., K)."""
        rows, known = hidden.reshape(-1, hidden.shape[-1]), before.shape[-1]  # (R, D)
        embedded = [self.embeddings[s](before[..., s].reshape(-1)) for s in range(known)]
        x = self.blocks(torch.stack([rows, *embedded], dim=1))  # (R, s + 1, D)
        logits = self.outputs[known](self.norm(x[:, -1]))  # (R, K)
        return logits.view(*hidden.shape[:-1], -1)


class Block(nn.Module):
    """A pre-norm transformer layer over the codes of one position: causal attention, gated feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = (nn.RMSNorm(dim, eps=1e-5) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (R, T, D), with causal attention."""
        y = self.attention_norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (R, heads, T, D / heads)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.feed_forward_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@hookimpl
def register_heads(registry: Registry[Head]) -> None:
    """Register this head."""
    registry.add("factorized", FactorizedHead, FactorizedHeadConfig)
