"""Which positions layers of transformers' decoders see: chunks, windows, and blocks in both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from janus_modular import ConfigError, same_block

MASKED_ATTENTION = ("sdpa", "eager")
"""Implementations of attention that take any mask."""


def refuse_chunks(family: Any) -> None:
    """Check that no layer attends in chunks, or that the context is a single chunk.

    Sessions do not apply chunks, and transformers counts them from the start of a row of several sequences.

    Raises:
        ConfigError: the context is longer than a chunk.
    """
    chunk = getattr(family, "attention_chunk_size", None)
    chunked = "chunked_attention" in (getattr(family, "layer_types", None) or ())
    if chunked and chunk and chunk < family.max_position_embeddings:
        raise ConfigError(
            f"'{family.model_type}' attends in chunks of {chunk} positions (attention_chunk_size), which"
            f" is not supported in a context of {family.max_position_embeddings} positions"
            f" (max_position_embeddings): write max_position_embeddings={chunk}, or choose another family"
        )


def refuse_blocks(family: Any) -> str:
    """Return why a family, as configured, does not support bidirectional blocks; "" if it does."""
    if family._attn_implementation not in MASKED_ATTENTION:
        return (
            f"its attention '{family._attn_implementation}' takes no mask: choose"
            f" {' or '.join(MASKED_ATTENTION)}"
        )
    layer_types = getattr(family, "layer_types", None)
    windows = sorted({*(layer_types or ())} - {"full_attention"})
    if windows or (getattr(family, "sliding_window", None) and not layer_types):
        return (
            f"'{family.model_type}' has layers that attend to a part of the past only"
            f" ({', '.join(windows) or 'sliding_window'}): choose a family with full causal attention"
        )
    return ""


def block_mask(
    family: Any, x: Tensor, positions: Tensor, together: Tensor | None, hidden: Tensor | None = None
) -> Tensor:
    """Return the attention mask (B, 1, T, T) of packed sequences with blocks and hidden positions.

    ``positions`` (B, T) are 0 where a sequence begins; positions of a block of ``together`` (B, T) attend to
    each other, and no position attends to those of ``hidden`` (B, T).
    """
    sequence = (positions == 0).cumsum(1)
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    if together is not None:
        seen = seen | same_block(together)
    if hidden is not None:
        seen = seen & ~hidden[:, None]
    seen = seen & (sequence[:, :, None] == sequence[:, None])
    if family._attn_implementation == "eager":  # which adds its mask to the scores
        return torch.where(seen, 0.0, torch.finfo(x.dtype).min).to(x.dtype).unsqueeze(1)
    return seen.unsqueeze(1)
