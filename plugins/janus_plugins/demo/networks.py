"""The network that is trained before the stages, and is no part of Janus: the classifier of drawings."""

from __future__ import annotations

from collections.abc import Sequence

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

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return the loss on a batch of pixels and labels."""
        pixels, labels = batch
        return {"class": F.cross_entropy(self(pixels), labels, label_smoothing=0.1)}

    @torch.inference_mode()
    def classify(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the predicted class (N,) of each image."""
        return self(to_pixels(images)).argmax(-1)
