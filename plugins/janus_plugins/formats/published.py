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
from janus_plugins.formats.tower import Tower

CODEBOOK_USED = 65536  # entries of the published statistics

TOWER = Tower("vision_model.vision_tower.")
NAMES = Renaming(
    [
        *TOWER.rows,
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
        """Return True for a config.json with this format's model type; JanusFlow's has the same."""
        return config.get("model_type") == self.model_type and "vision_gen_enc_config" not in config

    def to_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield native names; fused queries, keys and values become three views."""
        for name in weights:
            if name.startswith(TOWER.pool) or name == "gen_vision_model.quantize.codebook_used":
                continue
            yield from TOWER.to_native(name, NAMES.to_native(name) or name, weights[name])

    def from_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield published names, with zeros for unused weights and a copy for a tied head."""
        for name in weights:
            if TOWER.is_fused(name):
                continue
            published = NAMES.from_native(name)
            if published is None:
                raise CheckpointError(f"the published format cannot hold {name}.")
            yield published, TOWER.from_native(name, published, weights)
        if "backbone.model.lm_head.weight" not in weights:
            yield "language_model.lm_head.weight", weights["backbone.model.model.embed_tokens.weight"]
        yield from TOWER.unused(weights)
        yield "gen_vision_model.quantize.codebook_used", torch.zeros(CODEBOOK_USED)

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Read config.json and preprocessor_config.json; the language model's may be partial."""
        return read_config(folder)

    def write_config(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write config.json, preprocessor_config.json and processor_config.json."""
        write_config(config, folder)


@hookimpl
def register_formats(registry: Registry[CheckpointFormat]) -> None:
    """Register this format."""
    registry.add("published", PublishedFormat, PublishedConfig)
