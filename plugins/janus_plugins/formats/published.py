"""The format that the authors of Janus published: ``model_type: multi_modality``.

It stores two things that nothing uses: the tower's attention pool, and which codes were used lately.
They are left out on reading, and written as zeros, so that the published code loads it strictly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_modular import CheckpointError, CheckpointFormat, ComponentConfig, Registry, hookimpl
from janus_plugins.formats.published_config import read_config, write_config
from janus_plugins.formats.renaming import Renaming

CODEBOOK_USED = 65536  # entries of the published statistics

TOWER, ENCODER = "vision_model.vision_tower.", "understanding.encoder.model."
BLOCK, LAYER = f"{TOWER}blocks.{{n}}.", f"{ENCODER}encoder.layers.{{n}}."
QKV = ("q_proj", "k_proj", "v_proj")
NAMES = Renaming(
    [
        (f"{TOWER}patch_embed.proj.", f"{ENCODER}embeddings.patch_embedding."),
        (f"{TOWER}pos_embed", f"{ENCODER}embeddings.position_embedding.weight"),
        (f"{TOWER}norm.", f"{ENCODER}post_layernorm."),
        (f"{BLOCK}attn.qkv.", f"{LAYER}self_attn.q_proj."),  # and k, v
        (f"{BLOCK}attn.proj.", f"{LAYER}self_attn.out_proj."),
        (f"{BLOCK}norm1.", f"{LAYER}layer_norm1."),
        (f"{BLOCK}norm2.", f"{LAYER}layer_norm2."),
        (f"{BLOCK}mlp.", f"{LAYER}mlp."),
        ("aligner.", "understanding.adaptor."),
        ("gen_vision_model.", "generation.tokenizer."),
        ("gen_embed.", "generation.embedding."),
        ("gen_aligner.", "generation.adaptor."),
        ("gen_head.", "generation.head."),
        ("language_model.", "backbone.model."),
    ]
)


@dataclass
class PublishedConfig(ComponentConfig):
    """The format has no options."""


class PublishedFormat:
    """Reads and writes ``multi_modality`` checkpoints."""

    model_type = "multi_modality"

    def __init__(self, config: PublishedConfig) -> None:
        self.config = config

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Return True for a config.json with this format's model type."""
        return config.get("model_type") == self.model_type

    def to_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield native names; fused queries, keys and values become three views."""
        for name in weights:
            native = NAMES.to_native(name) or name
            if name.startswith(f"{TOWER}attn_pool.") or name == "gen_vision_model.quantize.codebook_used":
                continue
            if ".attn.qkv." in name:
                for projection, weight in zip(QKV, weights[name].chunk(3), strict=True):
                    yield native.replace(QKV[0], projection), weight
            elif name == f"{TOWER}pos_embed":
                yield native, weights[name].squeeze(0)
            else:
                yield native, weights[name]

    def from_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield published names, with zeros for unused weights and a copy for a tied head."""
        for name in weights:
            if name.startswith(ENCODER) and (".k_proj." in name or ".v_proj." in name):
                continue  # fused with the queries
            published = NAMES.from_native(name)
            if published is None:
                raise CheckpointError(f"the published format cannot hold {name}.")
            if ".attn.qkv." in published:
                fused = [weights[name.replace(QKV[0], projection)] for projection in QKV]
                yield published, torch.cat(fused)
            elif published == f"{TOWER}pos_embed":
                yield published, weights[name].unsqueeze(0)
            else:
                yield published, weights[name]
        if "backbone.model.lm_head.weight" not in weights:
            yield "language_model.lm_head.weight", weights["backbone.model.model.embed_tokens.weight"]
        yield from _unused(weights)

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Read config.json and preprocessor_config.json; the language model's may be partial."""
        return read_config(folder)

    def write_config(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write config.json, preprocessor_config.json and processor_config.json."""
        write_config(config, folder)


def _unused(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield zeros for the attention pool and the codes' statistics."""
    template = weights[f"{ENCODER}embeddings.patch_embedding.weight"]
    hidden_size = len(template)
    mlp_size = len(weights[f"{ENCODER}encoder.layers.0.mlp.fc1.weight"])
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
        yield f"{TOWER}attn_pool.{name}", torch.zeros(shape, dtype=template.dtype)
    yield "gen_vision_model.quantize.codebook_used", torch.zeros(CODEBOOK_USED)


@hookimpl
def register_formats(registry: Registry[CheckpointFormat]) -> None:
    """Register this format."""
    registry.add("published", PublishedFormat, PublishedConfig)
