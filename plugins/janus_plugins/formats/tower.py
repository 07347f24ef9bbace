"""The weights of the SigLIP tower as the authors of Janus and JanusFlow name them, which are timm's names.

The tower also has an attention pool, which nothing uses: it is left out on reading, and written as zeros, so
that the published code loads it strictly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

NATIVE = "understanding.encoder.model."
LAYER = f"{NATIVE}encoder.layers.{{n}}."
QKV = ("q_proj", "k_proj", "v_proj")


class Tower:
    """Renames the tower's weights; ``prefix`` is that of the published names."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.pool = f"{prefix}attn_pool."
        block = f"{prefix}blocks.{{n}}."
        self.rows = [
            (f"{prefix}patch_embed.proj.", f"{NATIVE}embeddings.patch_embedding."),
            (f"{prefix}pos_embed", f"{NATIVE}embeddings.position_embedding.weight"),
            (f"{prefix}norm.", f"{NATIVE}post_layernorm."),
            (f"{block}attn.qkv.", f"{LAYER}self_attn.q_proj."),  # and k, v
            (f"{block}attn.proj.", f"{LAYER}self_attn.out_proj."),
            (f"{block}norm1.", f"{LAYER}layer_norm1."),
            (f"{block}norm2.", f"{LAYER}layer_norm2."),
            (f"{block}mlp.", f"{LAYER}mlp."),
        ]
        """For a `janus_plugins.formats.renaming.Renaming`: (published, native)."""

    def to_native(self, name: str, native: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield a published weight under its native name; queries, keys and values become three views."""
        if name.startswith(self.prefix) and ".attn.qkv." in name:
            for projection, part in zip(QKV, weight.chunk(3), strict=True):
                yield native.replace(QKV[0], projection), part
        elif name == f"{self.prefix}pos_embed":
            yield native, weight.squeeze(0)
        else:
            yield native, weight

    def from_native(self, name: str, published: str, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the published weight of a native name; queries, keys and values are fused."""
        if name.startswith(NATIVE) and ".attn.qkv." in published:
            return torch.cat([weights[name.replace(QKV[0], projection)] for projection in QKV])
        return weights[name].unsqueeze(0) if published == f"{self.prefix}pos_embed" else weights[name]

    def is_fused(self, name: str) -> bool:
        """Return True if a native weight is written with the queries of its layer."""
        return name.startswith(NATIVE) and (".k_proj." in name or ".v_proj." in name)

    def unused(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield zeros for the attention pool, under published names; ``weights`` are native."""
        template = weights[f"{NATIVE}embeddings.patch_embedding.weight"]
        hidden_size = len(template)
        mlp_size = len(weights[f"{NATIVE}encoder.layers.0.mlp.fc1.weight"])
        pool: dict[str, tuple[int, ...]] = {
            "latent": (1, 1, hidden_size),
            "q.weight": (hidden_size, hidden_size),
            "q.bias": (hidden_size,),
            "kv.weight": (2 * hidden_size, hidden_size),
            "kv.bias": (2 * hidden_size,),
            "proj.weight": (hidden_size, hidden_size),
            "proj.bias": (hidden_size,),
            "norm.weight": (hidden_size,),
            "norm.bias": (hidden_size,),
            "mlp.fc1.weight": (mlp_size, hidden_size),
            "mlp.fc1.bias": (mlp_size,),
            "mlp.fc2.weight": (hidden_size, mlp_size),
            "mlp.fc2.bias": (hidden_size,),
        }
        for name, shape in pool.items():
            yield f"{self.pool}{name}", torch.zeros(shape, dtype=template.dtype)
