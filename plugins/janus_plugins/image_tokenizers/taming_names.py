"""Maps the names of taming-transformers' checkpoints, which later VQGANs use too, to native names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from janus_modular import CheckpointError

CODEBOOK = "quantize.embedding.weight"

STATISTICS = ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""Training statistics of codebooks that are updated by moving averages."""


def find_prefix(weights: Mapping[str, Tensor], tokenizer: str) -> str:
    """Return the prefix of the tokenizer's names, which is the codebook's.

    ``first_stage_model.`` takes precedence in checkpoints with two tokenizers: of images and of conditions.

    Raises:
        CheckpointError: there is no codebook, or no decoder beside it.
    """
    prefixes = [name.removesuffix(CODEBOOK) for name in weights if name.endswith(CODEBOOK)]
    if not prefixes:
        raise CheckpointError(
            f"{tokenizer} found no codebook: no name ends in '{CODEBOOK}'. Pass a tokenizer with nearest "
            "codes; those that were trained with Gumbel noise choose theirs by a convolution."
        )
    prefix = min(prefixes, key=lambda prefix: "first_stage_model." not in prefix)
    if not any(name.startswith(f"{prefix}decoder.") for name in weights):
        raise CheckpointError(
            f"{tokenizer} found no decoder: no name begins with '{prefix}decoder.'. transformers' Chameleon "
            "has no decoder: pass Chameleon's own vqgan.ckpt."
        )
    return prefix


def own_name(name: str, levels: int) -> str:
    """Return our name for a published name; ``decoder.up`` counts from the highest resolution."""
    name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", name)
    name = re.sub(
        r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.conv_blocks.{levels - 1 - int(match[1])}.", name
    )
    name = name.replace(".block.", ".res.")
    for i, block in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{block}.", f".mid.{i}.")
    return name
