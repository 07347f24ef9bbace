"""The independent judge: a small convolutional classifier of the real images, no part of Janus."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from janus_plugins.demo.images import as_pixels


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
