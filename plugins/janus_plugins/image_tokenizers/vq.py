"""The image tokenizer `vq`: small, convolutional, vector-quantised, and made to be trained from scratch.

A convolutional encoder computes a latent for each grid cell; each latent is replaced by the nearest of
``num_codes`` unit vectors, and a mirrored decoder computes pixels. These measures keep a small codebook in
use: cosine distances and a low code_dim (ViT-VQGAN, section 3.2), updates by moving averages instead of
gradients (VQ-VAE, appendix A.1), first steps without the quantiser, a k-means initialisation, and restarts of
unused codes. Counters and averages are buffers, so an interrupted training continues from its state dict.

The codebook moves with each forward pass in training, by the latents of all processes; of several
micro-batches (``accumulate``), each moves it. Which latents codes start from follows from the step alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_modular import (
    ComponentConfig,
    ImageTokenizer,
    Reconstruction,
    Registry,
    gather_examples,
    hookimpl,
)
from janus_plugins.sizes import check_sizes

MAX_NUMBERS = 2**26
"""Numbers in the largest codebook, 262,144 codes of 256 numbers as IBQ's; it is in memory thrice."""


@dataclass
class VqConfig(ComponentConfig):
    """Sizes of a `VqTokenizer`, and how its codebook learns."""

    channels: list[int] = field(default_factory=lambda: [8, 16, 32, 64])  # of each level, finest first
    blocks: int = 1  # residual blocks a level, in the encoder and in the decoder
    num_codes: int = 64  # K
    code_dim: int = 8  # of a code's vector
    commitment: float = 0.25  # weight of the loss that keeps latents near their codes
    decay: float = 0.95  # of the moving averages of the codebook
    continuous_steps: int = 60  # training steps without the quantiser; then k-means starts the codebook
    restart_below: float = 0.1  # restart codes used less than this fraction of a uniform use

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not self.channels:
            raise ValueError("channels: []; expected at least one level.")
        check_sizes(self, channels=1, blocks=0, num_codes=2, code_dim=1)
        if self.num_codes * self.code_dim > MAX_NUMBERS:
            raise ValueError(
                f"num_codes: {self.num_codes:,} codes of code_dim {self.code_dim:,} are a codebook of"
                f" {self.num_codes * self.code_dim:,} numbers; expected at most {MAX_NUMBERS:,}."
            )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(2) for layer in _activated(channels, channels)))

    def forward(self, x: Tensor) -> Tensor:
        """Transform features (N, C, h, w)."""
        return x + self.layers(x)


def _activated(channels: int, out: int) -> tuple[nn.Module, ...]:
    norm = nn.GroupNorm(gcd(channels, 8), channels)
    return norm, nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)


class VqTokenizer(nn.Module):
    """Encodes images into codes and decodes them; each level after the first halves the grid."""

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    steps: Tensor

    def __init__(self, config: VqConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks: tuple[int, ...] = (config.num_codes,)
        self.code_dim: int | None = config.code_dim
        self.value_range = (-1.0, 1.0)
        self.factor = 2 ** (len(config.channels) - 1)
        first, last = config.channels[0], config.channels[-1]

        encoder: list[nn.Module] = [nn.Conv2d(3, first, 3, padding=1)]
        decoder: list[nn.Module] = [nn.Conv2d(config.code_dim, last, 3, padding=1)]
        for finer, coarser in pairwise(config.channels):
            encoder += [ResidualBlock(finer) for _ in range(config.blocks)]
            encoder += [nn.Conv2d(finer, coarser, 4, stride=2, padding=1)]
        encoder += [ResidualBlock(last) for _ in range(config.blocks)]
        for coarser, finer in pairwise(reversed(config.channels)):
            decoder += [ResidualBlock(coarser) for _ in range(config.blocks)]
            decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(coarser, finer, 3, padding=1)]
        decoder += [ResidualBlock(first) for _ in range(config.blocks)]
        self.encoder = nn.Sequential(*encoder, *_activated(last, config.code_dim))
        self.decoder = nn.Sequential(*decoder, *_activated(first, 3))

        vectors = F.normalize(torch.randn(config.num_codes, config.code_dim), dim=-1)
        self.register_buffer("codebook", vectors)  # (K, code_dim), unit rows
        self.register_buffer("counts", torch.ones(config.num_codes))  # moving average of uses a step
        self.register_buffer("sums", vectors.clone())  # moving average of the latents at each code
        self.register_buffer("steps", torch.tensor(0))  # training steps taken

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of codes: one for each square of ``factor`` pixels."""
        if height % self.factor or width % self.factor:
            raise ValueError(f"vq: an image of {height}x{width} does not divide by its factor {self.factor}")
        return height // self.factor, width // self.factor

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) in [-1, 1] into code ids (N, P)."""
        self.grid(*pixels.shape[-2:])
        return self._nearest(self.latents(pixels))

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids (N, P) into pixels (N, 3, height, width), not clipped to the range."""
        return self._decode_vectors(self.codebook[codes], self.grid(height, width))

    def codebook_embeddings(self) -> Tensor:
        """Return the codebook (K, code_dim), unit rows."""
        return self.codebook

    def latents(self, pixels: Tensor) -> Tensor:
        """Return the unit latents (N, P, code_dim) of pixels, before the quantiser, in raster order."""
        x = self.encoder(pixels).flatten(2).transpose(1, 2)  # (N, P, code_dim)
        return F.normalize(x.float(), dim=-1).to(x.dtype)

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the losses ``pixels`` (squared error) and ``commitment``; in training, update the codes."""
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode pixels (N, 3, H, W), with straight-through gradients.

        In training, the codes are updated; in the first steps, without the quantiser, there are none.
        """
        latents = self.latents(pixels)  # (N, P, code_dim)
        quantised, codes = latents, None
        if self.training and self.steps >= self.config.continuous_steps:
            of_all = gather_examples(latents.detach()).flatten(0, 1)  # (M, code_dim), of all processes
            if self.steps == self.config.continuous_steps:
                self._initialize(of_all)
        if self.steps >= self.config.continuous_steps:
            codes = self._nearest(latents)
            quantised = self.codebook[codes]
            if self.training:
                self._update(of_all, self._nearest(of_all))
        if self.training:
            self.steps += 1
        commitment = F.mse_loss(latents, quantised.detach(), reduction="none").sum(-1).mean()
        straight = latents + (quantised - latents).detach()  # gradients pass the quantiser unchanged
        decoded = self._decode_vectors(straight, self.grid(*pixels.shape[-2:]))
        return Reconstruction(decoded, {"commitment": self.config.commitment * commitment}, "l2", codes)

    def _nearest(self, latents: Tensor) -> Tensor:
        # of unit vectors, the nearest has the largest dot product
        return (latents.float() @ self.codebook.float().T).argmax(-1)

    def _decode_vectors(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.decoder(vectors.transpose(1, 2).unflatten(2, grid))

    @torch.no_grad()
    def _initialize(self, latents: Tensor, rounds: int = 10) -> None:
        """Set the codebook to k-means centres of latents (M, code_dim) on the sphere."""
        self.codebook.copy_(latents[self._random_rows(len(latents))])
        for _ in range(rounds):
            sums, counts = self._gather(latents, self._nearest(latents))
            self.codebook.copy_(torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), self.codebook))
        sums, counts = self._gather(latents, self._nearest(latents))
        self.sums.copy_(sums)
        self.counts.copy_(counts)

    @torch.no_grad()
    def _update(self, latents: Tensor, codes: Tensor) -> None:
        """Move each code towards the mean of its latents (M, code_dim); restart unused codes."""
        sums, counts = self._gather(latents, codes)
        self.sums.lerp_(sums, 1 - self.config.decay)
        self.counts.lerp_(counts, 1 - self.config.decay)
        self.codebook.copy_(F.normalize(self.sums, dim=-1))
        uniform = len(latents) / self.config.num_codes  # uses of each code a step, if uniform
        idle = self.counts < self.config.restart_below * uniform
        samples = latents[self._random_rows(len(latents))]
        self.codebook.copy_(torch.where(idle[:, None], samples.to(self.codebook), self.codebook))
        self.sums.copy_(torch.where(idle[:, None], self.codebook * uniform, self.sums))
        self.counts.masked_fill_(idle, uniform)

    def _random_rows(self, count: int) -> Tensor:
        """Return a random row of ``count`` for each code (K,): the same in all processes of a run."""
        rng = torch.Generator().manual_seed(int(self.steps))
        return torch.randint(count, (self.config.num_codes,), generator=rng).to(self.codebook.device)

    def _gather(self, latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the latents of each code (K, code_dim), and count them (K,)."""
        sums = torch.zeros_like(self.sums).index_add_(0, codes, latents.to(self.sums))
        return sums, torch.bincount(codes, minlength=self.config.num_codes).to(self.counts)


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register ``vq``."""
    registry.add("vq", VqTokenizer, VqConfig)
