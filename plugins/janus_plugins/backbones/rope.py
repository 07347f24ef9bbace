"""Rotary embeddings whose frequencies depend on the sequence length, applied to each sequence separately.

For the types ``dynamic`` and ``longrope``, transformers chooses frequencies by the largest position of the
whole batch, so that the result of a short row would depend on longer rows and on padding.
"""

from __future__ import annotations

from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from janus_modular import ConfigError

LOCK = Lock()
"""Held while a rotary embedding has the frequencies of a sequence; threads share the module."""


class PerSequenceRope:
    """Mixin for rotary embeddings of transformers: they get a single sequence at a time and keep no state."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, T, d) for positions (B, T) that restart at every sequence.

        Raises:
            ConfigError: in an export, because a graph would use the same length for all rows.
        """
        embed = super().forward  # type: ignore[misc]
        if torch.compiler.is_exporting():
            raise ConfigError(
                "the backbone's rotary embedding chooses frequencies by the length of each sequence"
                " (rope_type dynamic or longrope), which graphs cannot do yet: export a backbone of another"
                " rope_type"
            )
        if position_ids.is_meta:
            result: tuple[Tensor, Tensor] = embed(x, position_ids, *args, **options)
            return result
        rows = []
        for row in position_ids:
            starts = [0, *((row[1:] == 0).nonzero().flatten() + 1).tolist(), len(row)]
            sequences = []
            for start, end in pairwise(starts):
                with LOCK:
                    for name in vars(self):
                        if name.endswith("max_seq_len_cached"):  # else a longer sequence's would stay
                            setattr(self, name, 0)
                    sequences.append(embed(x, row[None, start:end], *args, **options))
            rows.append([torch.cat(parts, dim=1) for parts in zip(*sequences, strict=True)])
        cos, sin = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return cos, sin


def separate_sequences(model: nn.Module) -> None:
    """Apply a decoder's length-dependent rotary embeddings to each sequence separately."""
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        names = types.values() if isinstance(types, dict) else [types]
        if any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names):
            base = type(module)
            module.__class__ = type(base.__name__, (PerSequenceRope, base), {})
