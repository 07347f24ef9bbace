"""Trains an understanding encoder against captions, as SigLIP was: every pair of a batch is a yes or a no.

The text side is a table of word vectors, averaged over a caption and thrown away afterwards: the captions
here are a handful of prompts with a class name in them. Two images of one class share their captions, so
a pair counts as a yes when the classes agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import log
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS = 1024  # rows of the table; a word's row is its hash


class Contrastive(nn.Module):
    """An encoder, and what only its training needs."""

    def __init__(self, encoder: nn.Module, width: int, normalize: Callable[[Tensor], Tensor]) -> None:
        """``encoder`` gives features (N, P, width) of pixels that ``normalize`` made ready for it."""
        super().__init__()
        self.encoder = encoder
        self.normalize = normalize
        self.project = nn.Linear(width, width, bias=False)
        self.words = nn.EmbeddingBag(WORDS, width)
        # "Sigmoid loss for language image pre-training", section 3.2: start at t = 10, b = -10 for batches
        # of thousands; one caption in ten is a yes here, so b starts at the odds of that.
        self.scale = nn.Parameter(torch.tensor(log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def see(self, pixels: Tensor) -> Tensor:
        """Embed images (N, 3, H, W), uint8, as unit vectors (N, width)."""
        return F.normalize(self.project(self.encoder(self.normalize(pixels)).mean(1)), dim=-1)

    def read(self, captions: Sequence[str]) -> Tensor:
        """Embed captions as unit vectors (N, width)."""
        rows = [
            [crc32(word.encode()) % WORDS for word in re.findall(r"\w+", one.lower())] for one in captions
        ]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        starts = F.pad(ends[:-1], (1, 0))
        return F.normalize(self.words(torch.tensor([i for row in rows for i in row]), starts), dim=-1)

    def losses(self, batch: tuple[Tensor, Tensor, list[str]]) -> dict[str, Tensor]:
        """Return the sigmoid loss of all pairs of a batch of pixels, classes and captions."""
        pixels, labels, captions = batch
        logits = self.see(pixels) @ self.read(captions).T * self.scale.exp() + self.bias  # (N, N)
        agree = labels[:, None] == labels[None]
        return {"pairs": -F.logsigmoid(torch.where(agree, logits, -logits)).sum(-1).mean()}
