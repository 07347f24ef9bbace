"""A perceptual loss: the distance between features of images and of their reconstructions.

As in LPIPS (Zhang et al. 2018), features are vectors of unit length at each place; here they are those of any
understanding encoder, whose weights are given and stay as they are.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import UnderstandingEncoder


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
