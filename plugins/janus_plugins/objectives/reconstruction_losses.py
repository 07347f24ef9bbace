"""Losses that a reconstruction may add: of features (perceptual), and of a discriminator (adversarial).

Perceptual: as in LPIPS (Zhang et al. 2018), features are vectors of unit length at each place; here they are
those of any understanding encoder, whose weights are given and stay as they are. Adversarial: a discriminator
of patches, with the hinge loss of VQGAN (Esser et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from janus_modular import OptimizerConfig, UnderstandingEncoder
from janus_plugins.sizes import check_sizes


@dataclass
class AdversarialConfig:
    """Sizes of the discriminator, and when it begins; defaults are LlamaGen's."""

    weight: float = 0.5  # of the loss that rewards images which the discriminator takes for real
    start: int = 20_000  # first step with a discriminator, when reconstructions are good already
    channels: int = 64  # of the first layer; each further layer has twice as many, up to eight times
    layers: int = 3  # that halve the image
    optimizer: OptimizerConfig | None = None  # of the discriminator; null: that of the run

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(self, weight=0, start=0, channels=1, layers=1)


class PatchDiscriminator(nn.Module):
    """Scores overlapping patches of an image: above 0, a patch is taken for real (Isola et al. 2017).

    Group norms take the place of batch norms, so that the score of an image depends on no other.
    """

    def __init__(self, config: AdversarialConfig, height: int, width: int) -> None:
        super().__init__()
        smallest = 3 * 2**config.layers  # the last two convolutions make 1 x 1 of 3 x 3
        if min(height, width) < smallest:
            raise ValueError(
                f"adversarial.layers: {config.layers} layers need images of {smallest}x{smallest} pixels at"
                f" least; these have {height}x{width}. Choose fewer"
            )
        layers: list[nn.Module] = [nn.Conv2d(3, config.channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        before = config.channels
        for number in range(1, config.layers + 1):
            after = config.channels * min(2**number, 8)
            stride = 2 if number < config.layers else 1
            layers += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1),
                nn.GroupNorm(gcd(after, 8), after),
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the scores (n, 1, h, w) of images (n, 3, H, W) in [-1, 1]."""
        return self.layers(pixels)

    def fooled(self, pixels: Tensor) -> Tensor:
        """Return the loss of reconstructions (scalar), whose gradients do not reach the discriminator."""
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return -functional_call(self, weights, (pixels,)).mean()

    def hinge(self, real: Tensor, reconstructed: Tensor) -> Tensor:
        """Return the loss of the discriminator (scalar), whose gradients do not reach the reconstructions."""
        scores, of_reconstructed = self(real), self(reconstructed.detach())
        return 0.5 * (torch.relu(1 - scores).mean() + torch.relu(1 + of_reconstructed).mean())


def perceptual_distance(
    encoder: UnderstandingEncoder, reconstructed: Tensor, pixels: Tensor, low: float, high: float
) -> Tensor:
    """Return the mean squared distance of unit features (scalar) of images (n, 3, H, W) from low to high."""
    with torch.no_grad():
        expected = _features(encoder, pixels, low, high)
    actual = _features(encoder, reconstructed, low, high)
    return (actual - expected).square().sum(-1).mean()


def frozen(encoder: UnderstandingEncoder) -> UnderstandingEncoder:
    """Return the encoder in eval mode, without gradients of its weights."""
    module = cast(nn.Module, encoder)
    module.eval().requires_grad_(False)
    return encoder


def _features(encoder: UnderstandingEncoder, pixels: Tensor, low: float, high: float) -> Tensor:
    spec = encoder.pixels
    x = (pixels.float() - low) / (high - low)
    if x.shape[-2:] != (spec.height, spec.width):
        x = F.interpolate(x, (spec.height, spec.width), mode="bicubic", antialias=True)
    if spec.normalize:
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (spec.mean, spec.std))
        x = (x - mean) / std
    return F.normalize(encoder(x), dim=-1)
