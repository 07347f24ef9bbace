"""Rotary embeddings whose frequencies follow a sequence's length: one length for each sequence, not for all.

Under the types ``dynamic`` and ``longrope`` transformers chooses frequencies by the largest position of a
whole batch, so that a short row would change with a long neighbour, and with the padding behind it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from janus_modular import ConfigError


class PerSequenceRope:
    """Mixed into a rotary embedding of transformers: it sees one sequence at a time, and remembers none."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, T, d) for positions (B, T) that restart at every sequence.

        Raises:
            ConfigError: it is exported; a graph would have one length for all rows.
        """
        once = super().forward  # type: ignore[misc]
        if torch.compiler.is_exporting():
            raise ConfigError(
                "the backbone's rotary embedding chooses frequencies by the length of each sequence"
                " (rope_type dynamic or longrope), which graphs cannot do yet: export a backbone of another"
                " rope_type"
            )
        if position_ids.is_meta:
            result: tuple[Tensor, Tensor] = once(x, position_ids, *args, **options)
            return result
        rows = []
        for row in position_ids:
            starts = [0, *((row[1:] == 0).nonzero().flatten() + 1).tolist(), len(row)]
            pieces = []
            for start, end in pairwise(starts):
                for name in vars(self):
                    if name.endswith("max_seq_len_cached"):  # else the frequencies of a longer one would stay
                        setattr(self, name, 0)
                pieces.append(once(x, row[None, start:end], *args, **options))
            rows.append([torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)])
        cos, sin = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return cos, sin


def separate_sequences(model: nn.Module) -> None:
    """Let rotary embeddings of a decoder that depend on lengths look at one sequence at a time."""
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        names = types.values() if isinstance(types, dict) else [types]
        if any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names):
            kind = type(module)
            module.__class__ = type(kind.__name__, (PerSequenceRope, kind), {})
