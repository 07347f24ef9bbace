"""The independent judge: a small convolutional classifier of the real images, no part of Janus."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import log
from zlib import crc32

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from janus_plugins.demo.labelled_images import as_pixels


class Classifier(nn.Module):
    """Three convolutions on the greys, halved in size first: images this small hold no more."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        for channels, out in ((1, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1),
                nn.BatchNorm2d(out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.LazyLinear(classes))

    def forward(self, pixels: Tensor) -> Tensor:
        """Turn pixels (N, 3, H, W), uint8, into class logits (N, classes)."""
        return self.layers(pixels.float().mean(1, keepdim=True) / 127.5 - 1)

    def losses(self, batch: tuple[Tensor, Tensor, list[str]]) -> dict[str, Tensor]:
        """Return its loss on a batch of pixels, labels and (unused) prompts."""
        pixels, labels, _ = batch
        return {"class": F.cross_entropy(self(pixels), labels, label_smoothing=0.1)}

    @torch.inference_mode()
    def classify(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the class (N,) that each image looks like."""
        return self(as_pixels(images)).argmax(-1)


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
