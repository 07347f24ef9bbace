"""Networks that are trained before the stages: the classifier, and the contrastive training of an encoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from math import log
from zlib import crc32

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from janus_plugins.demo.labelled_images import to_pixels


class Classifier(nn.Module):
    """A small classifier, independent of Janus: three convolutions on grey values at half the resolution."""

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
        """Return class logits (N, classes) of pixels (N, 3, H, W), uint8."""
        return self.layers(pixels.float().mean(1, keepdim=True) / 127.5 - 1)

    def losses(self, batch: tuple[Tensor, Tensor, list[str]]) -> dict[str, Tensor]:
        """Return the loss on a batch of pixels, labels and (unused) prompts."""
        pixels, labels, _ = batch
        return {"class": F.cross_entropy(self(pixels), labels, label_smoothing=0.1)}

    @torch.inference_mode()
    def classify(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the predicted class (N,) of each image."""
        return self(to_pixels(images)).argmax(-1)


TEXT_ROWS = 1024
"""Rows of the table of word embeddings; the row of a word is its hash."""


class Contrastive(nn.Module):
    """An understanding encoder with what its training on captions needs, as for SigLIP.

    Every pair of an image and a caption in a batch is a binary classification. The text side is a table of
    word embeddings, averaged over a caption, and is discarded afterwards: captions here are a handful of
    prompts with a class name in them. Two images of one class share their captions, so a pair is positive
    where the classes agree.
    """

    def __init__(self, encoder: nn.Module, feature_dim: int, normalize: Callable[[Tensor], Tensor]) -> None:
        """``encoder`` returns features (N, P, feature_dim) of pixels that ``normalize`` has prepared."""
        super().__init__()
        self.encoder = encoder
        self.normalize = normalize
        self.project = nn.Linear(feature_dim, feature_dim, bias=False)
        self.words = nn.EmbeddingBag(TEXT_ROWS, feature_dim)
        # "Sigmoid loss for language image pre-training", section 3.2: start at t = 10, b = -10 for batches of
        # thousands; one caption in ten is positive here, so b starts at the odds of that.
        self.scale = nn.Parameter(torch.tensor(log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-2.0))

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Embed images (N, 3, H, W), uint8, as unit vectors (N, feature_dim)."""
        return F.normalize(self.project(self.encoder(self.normalize(pixels)).mean(1)), dim=-1)

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions as unit vectors (N, feature_dim)."""
        rows = [
            [crc32(word.encode()) % TEXT_ROWS for word in re.findall(r"\w+", caption.lower())]
            for caption in captions
        ]
        ends = torch.tensor([len(row) for row in rows]).cumsum(0)
        starts = F.pad(ends[:-1], (1, 0))
        return F.normalize(self.words(torch.tensor([i for row in rows for i in row]), starts), dim=-1)

    def losses(self, batch: tuple[Tensor, Tensor, list[str]]) -> dict[str, Tensor]:
        """Return the sigmoid loss of all pairs of a batch of pixels, classes and captions."""
        pixels, labels, captions = batch
        similarity = self.embed_images(pixels) @ self.embed_captions(captions).T  # (N, N)
        logits = similarity * self.scale.exp() + self.bias
        is_positive = labels[:, None] == labels[None]
        return {"pairs": -F.logsigmoid(torch.where(is_positive, logits, -logits)).sum(-1).mean()}
