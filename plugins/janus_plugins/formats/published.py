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
    """Nothing to choose: the format is fixed."""


class PublishedFormat:
    """Reads and writes ``multi_modality`` checkpoints."""

    model_type = "multi_modality"

    def __init__(self, config: PublishedConfig) -> None:
        self.config = config

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Recognise it by its model type."""
        return config.get("model_type") == self.model_type

    def to_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield native names; fused queries, keys and values as three views."""
        for name in weights:
            ours = NAMES.to_native(name) or name
            if name.startswith(f"{TOWER}attn_pool.") or name == "gen_vision_model.quantize.codebook_used":
                continue
            if ".attn.qkv." in name:
                for one, third in zip(QKV, weights[name].chunk(3), strict=True):
                    yield ours.replace(QKV[0], one), third
            elif name == f"{TOWER}pos_embed":
                yield ours, weights[name].squeeze(0)
            else:
                yield ours, weights[name]

    def from_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield published names; what nothing uses as zeros, a tied head as a copy."""
        for name in weights:
            if name.startswith(ENCODER) and (".k_proj." in name or ".v_proj." in name):
                continue  # fused with the queries
            theirs = NAMES.from_native(name)
            if theirs is None:
                raise CheckpointError(f"the published format has no place for {name}.")
            if ".attn.qkv." in theirs:
                yield theirs, torch.cat([weights[name.replace(QKV[0], one)] for one in QKV])
            elif theirs == f"{TOWER}pos_embed":
                yield theirs, weights[name].unsqueeze(0)
            else:
                yield theirs, weights[name]
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
    like = weights[f"{ENCODER}embeddings.patch_embedding.weight"]
    width = len(like)
    wide = len(weights[f"{ENCODER}encoder.layers.0.mlp.fc1.weight"])
    pool: dict[str, tuple[int, ...]] = {
        "latent": (1, 1, width),
        "q.weight": (width, width),
        "q.bias": (width,),
        "kv.weight": (2 * width, width),
        "kv.bias": (2 * width,),
        "proj.weight": (width, width),
        "proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "mlp.fc1.weight": (wide, width),
        "mlp.fc1.bias": (wide,),
        "mlp.fc2.weight": (width, wide),
        "mlp.fc2.bias": (width,),
    }
    for name, shape in pool.items():
        yield f"{TOWER}attn_pool.{name}", torch.zeros(shape, dtype=like.dtype)
    yield "gen_vision_model.quantize.codebook_used", torch.zeros(CODEBOOK_USED)


@hookimpl
def register_formats(registry: Registry[CheckpointFormat]) -> None:
    """Offer this format."""
    registry.add("published", PublishedFormat, PublishedConfig)
