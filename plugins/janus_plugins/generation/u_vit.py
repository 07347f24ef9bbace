"""The shallow U-ViT of JanusFlow: convolutions between noisy latents and the backbone's positions.

The encoder turns latents into one vector a patch, the decoder turns hidden states into a velocity, and a long
skip leads from the one to the other. Their blocks are ConvNeXt V2's (Woo et al. 2023), with an RMSNorm, and
are scaled and shifted by the embedding of the time, as in DiT (Peebles and Xie 2023).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6  # of every norm, as published


class TimeEmbedding(nn.Module):
    """Embeds times (N,) as (N, D): sines and cosines, and a perceptron of two layers."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, time: Tensor) -> Tensor:
        """Embed times (N,), 0 for noise and 1 for the image; they are multiplied by 1000, as in DiT."""
        half = self.channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = 1000 * time.float()[:, None] * torch.exp(-math.log(10000) * exponents)  # (N, C / 2)
        x = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its share of the image's response: (N, h, w, C) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        response = x.float().square().sum((1, 2), keepdim=True).sqrt()  # (N, 1, 1, C)
        share = (response / (response.mean(-1, keepdim=True) + EPS)).to(x.dtype)
        return self.bias + (self.weight * share + 1) * x


class ConditionedBlock(nn.Module):
    """A residual block over (N, C, h, w), scaled and shifted by the time's embedding (N, D)."""

    def __init__(self, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.RMSNorm(channels, eps=EPS)
        self.channelwise_linear_1 = nn.Linear(channels, 4 * channels)
        self.channelwise_norm = GlobalResponseNorm(4 * channels)
        self.channelwise_linear_2 = nn.Linear(4 * channels, channels)
        self.cond_embeds_mapper = nn.Linear(hidden_size, 2 * channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # (N, h, w, C)
        y = self.channelwise_norm(F.gelu(self.channelwise_linear_1(y)))
        x = x + self.channelwise_linear_2(y).permute(0, 3, 1, 2)
        scale, shift = self.cond_embeds_mapper(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class Blocks(nn.Module):
    """Several blocks, one after the other."""

    def __init__(self, count: int, channels: int, hidden_size: int) -> None:
        super().__init__()
        self.res_blocks = nn.ModuleList(ConditionedBlock(channels, hidden_size) for _ in range(count))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x, time)
        return x


class UViTEncoder(nn.Module):
    """Latents and times to one vector a patch, which is also the long skip, and the times' embeddings."""

    def __init__(
        self, latent_channels: int, channels: int, patch_size: int, blocks: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(channels, hidden_size)
        self.in_conv = nn.Conv2d(latent_channels, channels, patch_size, stride=patch_size)
        self.mid_block = Blocks(blocks, channels, hidden_size)

    def forward(self, latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Encode latents (N, c, h, w) at times (N,); return (N, C, h / patch, w / patch) and (N, D)."""
        embedding = self.time_embed(time)
        return self.mid_block(self.in_conv(latents), embedding), embedding


class UViTDecoder(nn.Module):
    """Features of hidden states and the long skip to velocities."""

    def __init__(
        self, latent_channels: int, channels: int, patch_size: int, blocks: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(channels, eps=EPS)
        self.mid_block = Blocks(blocks, 2 * channels, hidden_size)
        unpatch = Unpatch(2 * channels, latent_channels, patch_size)
        self.out_convs = nn.Sequential(unpatch)  # as published: a list of one

    def forward(self, features: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        """Decode features and skip, both (N, C, h, w), and time embeddings (N, D) into (N, c, h', w')."""
        x = self.input_norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out_convs(self.mid_block(torch.cat([x, skip], dim=1), time))


class Unpatch(nn.Module):
    """Features (N, C, h, w) to numbers (N, c, h * patch, w * patch)."""

    def __init__(self, channels: int, latent_channels: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm = nn.RMSNorm(channels, eps=EPS)
        self.unpatch_conv = nn.Conv2d(channels, latent_channels * patch_size**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.unpatch_conv(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return F.pixel_shuffle(x, self.patch_size)
