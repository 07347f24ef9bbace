"""transformers' format of Janus: ``JanusForConditionalGeneration``, ``model_type: janus``.

transformers' own code draws on a square grid of as many codes as the understanding encoder has patches,
and compares codes without normalising them; the weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_modular import CheckpointError, CheckpointFormat, ComponentConfig, Registry, hookimpl
from janus_plugins.formats.renaming import Renaming
from janus_plugins.formats.transformers_config import read_config, write_config

ENCODER, CODES = "understanding.encoder.model.", "generation.tokenizer."
LAYER = "encoder.layers.{n}.self_attn."
DEEPEST = 16  # linear layers of an adaptor that have names


def mlp(hf_prefix: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Name an adaptor's layers: activations have numbers of their own in the native names."""
    yield f"{hf_prefix}fc1.", f"{prefix}layers.0."
    for i in range(DEEPEST - 1):
        yield f"{hf_prefix}hidden_layers.{i}.", f"{prefix}layers.{2 * i + 2}."


def half(name: str, levels: str) -> Iterator[tuple[str, str]]:
    """Name the encoder or the decoder of the image tokenizer; ``levels`` is what transformers calls them."""
    hf_prefix, prefix = f"model.vqmodel.{name}.", f"{CODES}{name}."
    yield f"{hf_prefix}{levels}.{{n}}.block.", f"{prefix}conv_blocks.{{n}}.res."
    yield f"{hf_prefix}{levels}.", f"{prefix}conv_blocks."
    for i, block in enumerate(("block_1", "attn_1", "block_2")):
        yield f"{hf_prefix}mid.{block}.", f"{prefix}mid.{i}."


NAMES = Renaming(
    [
        (f"model.vision_model.{LAYER}projection_layer.", f"{ENCODER}{LAYER}out_proj."),
        ("model.vision_model.", ENCODER),
        *mlp("model.aligner.", "understanding.adaptor."),
        *half("encoder", "down"),
        *half("decoder", "up"),
        ("model.vqmodel.", CODES),
        ("model.generation_embeddings.", "generation.embedding."),
        *mlp("model.generation_aligner.", "generation.adaptor."),
        ("model.generation_head.proj_out.", "generation.head.output_mlp_projector."),
        ("model.generation_head.vision_head.", "generation.head.vision_head."),
        ("model.language_model.", "backbone.model.model."),
        ("lm_head.", "backbone.model.lm_head."),
    ]
)


@dataclass
class TransformersConfig(ComponentConfig):
    """The format has no options."""


class TransformersFormat:
    """Reads and writes ``janus`` checkpoints."""

    model_type = "janus"

    def __init__(self, config: TransformersConfig) -> None:
        self.config = config

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Return True for a config.json with this format's model type."""
        return config.get("model_type") == self.model_type

    def to_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield native names."""
        for name in weights:
            yield NAMES.to_native(name) or name, weights[name]

    def from_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield transformers' names."""
        for name in weights:
            hf_name = NAMES.from_native(name)
            if hf_name is None:
                raise CheckpointError(f"the transformers format cannot hold {name}.")
            yield hf_name, weights[name]

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Read config.json and the image processor's settings."""
        return read_config(folder)

    def write_config(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write config.json, generation_config.json and the processor's files."""
        write_config(config, folder)


@hookimpl
def register_formats(registry: Registry[CheckpointFormat]) -> None:
    """Register this format."""
    registry.add("transformers", TransformersFormat, TransformersConfig)
