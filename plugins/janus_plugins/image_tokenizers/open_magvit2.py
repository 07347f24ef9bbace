"""The image tokenizer `open-magvit2`: a position is 18 bits, the signs of its latent; there is no codebook.

A convolutional encoder computes latents, which are replaced by their signs (lookup-free quantisation: Yu et
al. 2023, section 3.1), and a decoder computes pixels from them. 2^18 codes are too many for one softmax, so
a position has two codes, of 6 and of 12 bits (Luo et al. 2024, section 3.2), which the head ``factorized``
predicts. Layers and names are those of TencentARC's SEED-Voken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import CheckpointError, ComponentConfig, ImageTokenizer, Reconstruction, Registry, hookimpl
from janus_plugins.image_tokenizers.codebook import entropy_loss
from janus_plugins.image_tokenizers.convolutional import BlockLevel, named, norm, residuals
from janus_plugins.image_tokenizers.ema import ema_weights_first
from janus_plugins.sizes import check_sizes, squares


@dataclass
class OpenMagvit2Config(ComponentConfig):
    """The published tokenizers of factor 16: 2^18 codes, 115.128 M parameters.

    Factor 8 is ``channel_multipliers: [1, 2, 2, 4]``, 2^14 codes are ``bits: [14]``.
    """

    channels: int = 128  # of the highest resolution
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # one per resolution
    residual_blocks: int = 4  # per resolution, and between the halves
    bits: list[int] = field(default_factory=lambda: [6, 12])  # of each code of a position; [14]: one code
    commitment: float = 0.25  # weight of the loss that pulls latents to their signs
    entropy: float = 0.1  # weight of the loss that stds the codes' use; 0: not computed
    entropy_temperature: float = 0.01  # of the soft assignment of latents to codes in it

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("channel_multipliers", "bits"):
            if not getattr(self, name):
                raise ValueError(f"{name}: []; expected at least one.")
        check_sizes(self, channels=1, channel_multipliers=1, residual_blocks=1, bits=1)
        if max(self.bits) > 18:
            raise ValueError(f"bits: {self.bits}; a code has at most 18: split them into several.")


class OpenMagvit2Tokenizer(nn.Module):
    """Images in [-1, 1] to codes (N, P, S) and back, (N, P) of one code; runs in the dtype of its weights.

    A code's first bit is its lowest. The vector of a code has an entry for each bit of a position: the signs
    of its own bits, 0 for the others, so that the vectors of a position add up to the decoder's input.
    """

    value_range = (-1.0, 1.0)
    signs: Tensor
    values: Tensor

    def __init__(self, config: OpenMagvit2Config) -> None:
        super().__init__()
        self.config = config
        self.codebooks = tuple(2**bits for bits in config.bits)
        self.code_dim: int | None = sum(config.bits)
        self.factor = 2 ** (len(config.channel_multipliers) - 1)
        self.encoder = build_encoder(config)
        self.decoder = Decoder(config)
        exponents = torch.arange(max(config.bits))
        signs = (torch.arange(max(self.codebooks))[:, None] >> exponents & 1) * 2.0 - 1
        self.register_buffer("signs", signs, persistent=False)  # (K, bits) of every code, of the longest
        self.register_buffer("values", 2**exponents, persistent=False)  # (bits,) of each bit

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of positions; at least two, of which the decoder takes the variance."""
        rows, columns = squares("open-magvit2", height, width, self.factor)
        if rows * columns < 2:
            raise ValueError(
                f"open-magvit2: {height}x{width} pixels have {rows * columns} positions; expected 2 or more"
            )
        return rows, columns

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into codes (N, P, S), or (N, P) of one code a position."""
        return self._codes(self._latents(pixels))

    def _codes(self, latents: Tensor) -> Tensor:
        """Return the codes of latents (N, P, bits), as `encode` does."""
        positive = (latents > 0).to(torch.int64).split(self.config.bits, dim=-1)
        codes = [(bits * self.values[: bits.shape[-1]]).sum(-1) for bits in positive]  # S of (N, P)
        return torch.stack(codes, dim=-1) if len(codes) > 1 else codes[0]

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode codes, as `encode` gives them, into pixels (N, 3, height, width), not clipped."""
        rows, columns = self.grid(height, width)
        if codes.shape[1] != rows * columns:
            raise ValueError(f"open-magvit2: {codes.shape[1]} positions do not fill {rows}x{columns}")
        by_code = codes.unbind(-1) if len(self.codebooks) > 1 else [codes]
        signs = [self.signs[code][..., :bits] for code, bits in zip(by_code, self.config.bits, strict=True)]
        return self._decode_vectors(torch.cat(signs, dim=-1), (rows, columns))

    def codebook_embeddings(self) -> Tensor:
        """Return the signs of each code (sum of K, all bits), 0 at the bits of the other codes."""
        signs = (self.signs[: 2**bits, :bits] for bits in self.config.bits)
        return torch.block_diag(*signs).to(self.decoder.conv_in.weight.dtype)

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``pixels`` (L1), ``commitment`` and, if weighted, ``entropy``, which are to be added.

        The gradient of the signs is straight-through. The entropy is computed for each code by itself: bits
        are independent, so the first term is the same, and the second does not need 2^18 sums. The
        published tokenizers were also trained with a perceptual and an adversarial loss.
        """
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode pixels (N, 3, H, W), with straight-through gradients."""
        latents = self._latents(pixels)  # (N, P, bits)
        signs = torch.where(latents > 0, 1.0, -1.0).to(latents.dtype)
        decoded = self._decode_vectors(latents + (signs - latents).detach(), self.grid(*pixels.shape[-2:]))
        losses = {"commitment": self.config.commitment * F.mse_loss(latents, signs)}
        if self.config.entropy:
            entropies = map(self.entropy_loss, latents.split(self.config.bits, dim=-1))
            losses["entropy"] = self.config.entropy * reduce(torch.add, entropies)
        return Reconstruction(decoded, losses, "l1", self._codes(latents.detach()))

    def entropy_loss(self, latents: Tensor) -> Tensor:
        """Reward confident choices and a uniform use of a code (..., bits), by softmax(2 z·c / temperature).

        c are the signs of the codes; in float32.
        """
        bits = latents.shape[-1]
        logits = 2 * latents.float() @ self.signs[: 2**bits, :bits].float().T
        return entropy_loss(logits / self.config.entropy_temperature)

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the published files (``state_dict.encoder.``); of EMA and trained weights, the EMA weights."""
        anchor = "encoder.conv_in.weight"
        prefix = next((name.removesuffix(anchor) for name in weights if name.endswith(anchor)), None)
        if prefix is None:
            raise CheckpointError(
                f"open-magvit2 found no encoder: no name ends in '{anchor}'; pass SEED-Voken's"
            )
        return ema_weights_first(weights, prefix, self)

    def _latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into latents (N, P, bits)."""
        self.grid(*pixels.shape[-2:])
        return self.encoder(pixels.to(self.decoder.conv_in.weight.dtype)).flatten(2).transpose(1, 2)

    def _decode_vectors(self, signs: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode signs (N, P, bits) into pixels."""
        latents = signs.to(self.decoder.conv_in.weight.dtype).transpose(1, 2)
        return self.decoder(latents.unflatten(2, grid))


def build_encoder(config: OpenMagvit2Config) -> nn.Sequential:
    """Build the encoder: pixels (N, 3, H, W) to latents (N, bits, H / factor, W / factor)."""
    widths = [config.channels * multiplier for multiplier in [1, *config.channel_multipliers]]
    levels = [BlockLevel(*pair, config.residual_blocks, bias=False) for pair in pairwise(widths)]
    for level, out_channels in zip(levels[:-1], widths[1:], strict=False):
        level.downsample = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
    return named(
        conv_in=nn.Conv2d(3, config.channels, 3, padding=1, bias=False),
        down=nn.Sequential(*levels),
        mid_block=residuals(widths[-1], widths[-1], config.residual_blocks, bias=False),
        norm_out=norm(widths[-1]),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], sum(config.bits), 1),
    )


class Decoder(nn.Module):
    """Decodes latents (N, bits, h, w) into pixels (N, 3, h * factor, w * factor).

    Before each resolution, features are normalised, then scaled and shifted by linear functions of the
    standard deviation and the mean of the image's latents (section 3.1: adaptive group normalisation).
    """

    def __init__(self, config: OpenMagvit2Config) -> None:
        super().__init__()
        bits, blocks = sum(config.bits), config.residual_blocks
        widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
        inputs = [*widths[1:], widths[-1]]  # input channels of each resolution, finest first
        self.conv_in = nn.Conv2d(bits, widths[-1], 3, padding=1)
        self.mid_block = residuals(widths[-1], widths[-1], blocks, bias=False)
        self.adaptive = nn.ModuleList(AdaptiveGroupNorm(bits, channels) for channels in inputs)
        self.up = nn.ModuleList(
            BlockLevel(*pair, blocks, bias=False) for pair in zip(inputs, widths, strict=True)
        )
        for level, out_channels in zip(list(self.up)[1:], widths[1:], strict=True):
            level.upsample = Upsample(out_channels)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents into pixels."""
        x32 = latents.float().flatten(2)  # (N, bits, P)
        mean = x32.mean(-1)
        variance = (x32 - mean.unsqueeze(-1)).square().sum(-1) / (x32.shape[-1] - 1)
        style = (variance + 1e-6).sqrt().to(latents.dtype), mean.to(latents.dtype)
        x = self.mid_block(self.conv_in(latents))
        for adapt, level in zip(list(self.adaptive)[::-1], list(self.up)[::-1], strict=True):
            x = level(adapt(x, *style))
        return self.conv_out(F.silu(self.norm_out(x)))


class AdaptiveGroupNorm(nn.Module):
    """Group normalisation of features (N, C, h, w) with scale and shift computed from the latents."""

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.gn = norm(channels, affine=False)
        self.gamma, self.beta = nn.Linear(bits, channels), nn.Linear(bits, channels)

    def forward(self, x: Tensor, std: Tensor, mean: Tensor) -> Tensor:
        """Normalise x for the standard deviation and the mean (N, bits) of the latents."""
        return self.gn(x) * self.gamma(std)[..., None, None] + self.beta(mean)[..., None, None]


class Upsample(nn.Module):
    """A convolution to four times the channels, rearranged into pixels: (N, C, h, w) to (N, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x; each quarter of the channels becomes one pixel of four, the upper left first."""
        pixels = self.conv1(x).unflatten(1, (4, -1)).transpose(1, 2)  # (N, channels, 4, h, w)
        return F.pixel_shuffle(pixels.flatten(1, 2), 2)


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register this tokenizer."""
    registry.add("open-magvit2", OpenMagvit2Tokenizer, OpenMagvit2Config)
