"""A plugin with a backbone whose positions have three axes: the decoder of Qwen2-VL, from transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from janus_modular import Backbone, Cache, ComponentConfig, Registry, TensorCache, hookimpl


@dataclass
class MropeConfig(ComponentConfig):
    """Sizes."""

    vocab_size: int = 320
    hidden_size: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 640


class MropeBackbone(nn.Module):
    """Qwen2-VL's decoder; logits are products with the token embeddings."""

    position_axes = ("temporal", "height", "width")

    def __init__(self, config: MropeConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size, self.context = config.hidden_size, config.context
        family = Qwen2VLTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
        )
        family._attn_implementation = "sdpa"
        self.model = Qwen2VLTextModel(family)

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return self.model.embed_tokens.weight.shape[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up tokens (B, T) as (B, T, D)."""
        return F.embedding(tokens, self.model.embed_tokens.weight)

    def forward(self, x: Tensor, *, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Turn embeddings (B, T, D), at positions (4, B, T), into hidden states (B, T, D)."""
        index = positions[0]
        if cache is None:  # earlier positions of the same sequence
            sequence = (index == 0).cumsum(1)
            mask = (sequence[:, :, None] == sequence[:, None]).tril().unsqueeze(1)
        else:
            mask = cache.begin(x.shape[1])
        embeddings = self.model.rotary_emb(x, positions[1:])
        for layer in self.model.layers:
            x = layer(x, attention_mask=mask, position_embeddings=embeddings, past_key_values=cache)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (..., D) into logits (..., V)."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def new_cache(self, rows: int, max_seq_len: int) -> TensorCache:
        """Return an empty KV cache."""
        return TensorCache(rows, max_seq_len, device=self.model.embed_tokens.weight.device)

    def resize_vocab(self, vocab_size: int) -> None:
        """Grow to ``vocab_size`` tokens."""
        if (more := vocab_size - self.vocab_size) > 0:
            weight = self.model.embed_tokens.weight.data
            rows = torch.cat([weight, weight.mean(0).expand(more, -1)])
            self.model.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
            self.config.vocab_size = vocab_size


@hookimpl
def register_backbones(registry: Registry[Backbone]) -> None:
    """Register the backbone."""
    registry.add("mrope", MropeBackbone, MropeConfig)
