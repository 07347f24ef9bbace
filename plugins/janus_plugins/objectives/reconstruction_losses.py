"""An adversarial loss of reconstructed images: a discriminator of patches, with the hinge loss of VQGAN."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn
from torch.func import functional_call

from janus_modular import OptimizerConfig
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
