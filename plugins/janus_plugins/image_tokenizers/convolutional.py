"""The convolutional image tokenizer of VQGAN, without losses and names of pretrained weights.

An encoder of residual blocks halves the resolution from level to level, each latent is replaced by a vector
of a codebook, and a mirrored decoder computes pixels (Esser et al. 2021, table 7). It is fully convolutional:
any height and width that are multiples of ``factor`` work.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ComponentConfig
from janus_plugins.image_tokenizers.codebook import Codebook
from janus_plugins.sizes import check_sizes, squares


@dataclass
class ConvolutionalConfig(ComponentConfig):
    """Sizes of a `ConvolutionalTokenizer`."""

    channels: int = 128  # of the highest resolution
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # one per resolution
    residual_blocks: int = 2  # per resolution; the decoder has one more
    latent_channels: int = 256  # between the convolutions and the projection to a code
    num_codes: int = 16384  # K
    code_dim: int = 256  # of a code's own vector

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers: []; expected at least one resolution.")
        check_sizes(
            self,
            channels=1,
            channel_multipliers=1,
            residual_blocks=1,
            latent_channels=1,
            num_codes=1,
            code_dim=1,
        )


class ConvolutionalTokenizer(nn.Module):
    """Images in [-1, 1] to code ids and back; runs in the dtype of its weights.

    Subclasses add their name, their losses and ``read_pretrained``.
    """

    name: ClassVar[str]  # as registered
    value_range = (-1.0, 1.0)

    def __init__(self, config: ConvolutionalConfig, quantize: Codebook, *, attention: bool = True) -> None:
        super().__init__()
        self.codebooks: tuple[int, ...] = (config.num_codes,)
        self.code_dim: int | None = config.code_dim
        self.factor = 2 ** (len(config.channel_multipliers) - 1)
        self.encoder = build_encoder(config, attention)
        self.decoder = build_decoder(config, attention)
        self.quantize = quantize
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of codes: one for each square of ``factor`` pixels."""
        return squares(self.name, height, width, self.factor)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into code ids (N, P)."""
        return self.quantize.nearest(self.latents(pixels))

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids (N, P) into pixels (N, 3, height, width), not clipped to the range."""
        grid = self.grid(height, width)
        if codes.shape[-1] != grid[0] * grid[1]:
            raise ValueError(
                f"{self.name}: {codes.shape[-1]} codes do not fill a grid of {grid[0]}x{grid[1]}"
            )
        return self.decode_vectors(self.quantize(codes), grid)

    def codebook_embeddings(self) -> Tensor:
        """Return the codebook (K, code_dim), normalised if latents are."""
        return self.quantize.vectors()

    def latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into latents (N, P, code_dim), normalised as the codebook is."""
        self.grid(*pixels.shape[-2:])
        encoded = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype)))  # (N, c, h, w)
        return self.quantize.normalize(encoded.flatten(2).transpose(1, 2))

    def decode_vectors(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode code vectors (N, P, code_dim) into pixels."""
        latents = vectors.transpose(1, 2).unflatten(2, grid)  # (N, code_dim, h, w)
        return self.decoder(self.post_quant_conv(latents))


def build_encoder(config: ConvolutionalConfig, attention: bool) -> nn.Sequential:
    """Build the encoder: pixels (N, 3, H, W) to latents (N, latent_channels, H / factor, W / factor)."""
    channels = [config.channels * multiplier for multiplier in [1, *config.channel_multipliers]]
    levels = [Level(*pair, config.residual_blocks) for pair in pairwise(channels)]
    if attention:
        levels[-1].add_attention()
    for level in levels[:-1]:  # padded at the right and the bottom only
        halve = nn.Conv2d(level.channels, level.channels, 3, stride=2)
        level.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=halve)
    return named(
        conv_in=nn.Conv2d(3, config.channels, 3, padding=1),
        conv_blocks=nn.Sequential(*levels),
        mid=middle(channels[-1]),
        norm_out=norm(channels[-1]),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1),
    )


def build_decoder(config: ConvolutionalConfig, attention: bool) -> nn.Sequential:
    """Build the decoder: latents (N, latent_channels, h, w) to pixels (N, 3, h * factor, w * factor)."""
    multipliers = config.channel_multipliers[::-1]
    channels = [config.channels * multiplier for multiplier in [multipliers[0], *multipliers]]
    levels = [Level(*pair, config.residual_blocks + 1) for pair in pairwise(channels)]
    if attention:
        levels[0].add_attention()
    for level in levels[:-1]:
        smooth = nn.Conv2d(level.channels, level.channels, 3, padding=1)
        level.upsample = named(repeat=nn.Upsample(scale_factor=2), conv=smooth)
    return named(
        conv_in=nn.Conv2d(config.latent_channels, channels[0], 3, padding=1),
        mid=middle(channels[0]),
        conv_blocks=nn.Sequential(*levels),
        norm_out=norm(channels[-1]),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(channels[-1], 3, 3, padding=1),
    )


class Level(nn.Module):
    """The blocks of a resolution and the layer to the next: (N, channels, h, w) to (N, out, h', w')."""

    def __init__(self, channels: int, out: int, blocks: int) -> None:
        super().__init__()
        self.channels = out
        self.res = nn.ModuleList(Residual(out if i else channels, out) for i in range(blocks))
        self.attn = nn.ModuleList(nn.Identity() for _ in range(blocks))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def add_attention(self) -> None:
        """Add attention after each residual block, as published models have at the lowest resolution."""
        self.attn = nn.ModuleList(Attention(self.channels) for _ in self.res)

    def forward(self, x: Tensor) -> Tensor:
        for residual, attention in zip(self.res, self.attn, strict=True):
            x = attention(residual(x))
        return self.upsample(self.downsample(x))


class BlockLevel(nn.Module):
    """A `Level` without attention, with the names of later tokenizers: ``block.0``, ..."""

    def __init__(self, channels: int, out: int, blocks: int, groups: int = 32, *, bias: bool = True) -> None:
        super().__init__()
        self.block = residuals(channels, out, blocks, groups, bias=bias)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.downsample(self.block(x)))


class Residual(nn.Module):
    """Two convolutions, added to their input: (N, channels, h, w) to (N, out, h, w)."""

    def __init__(self, channels: int, out: int, groups: int = 32, *, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(channels, groups), nn.Conv2d(channels, out, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = norm(out, groups), nn.Conv2d(out, out, 3, padding=1, bias=bias)
        self.nin_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class Attention(nn.Module):
    """One head over all positions of (N, channels, h, w), added to its input."""

    def __init__(self, channels: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            layer(y).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )  # (N, 1, P, channels): exported attention needs an axis of heads
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj_out(y)


def named(**layers: nn.Module) -> nn.Sequential:
    """Return a Sequential of named layers."""
    return nn.Sequential(OrderedDict(layers))


def middle(channels: int) -> nn.Sequential:
    """Build the middle of encoder and decoder: residual, attention, residual."""
    return nn.Sequential(Residual(channels, channels), Attention(channels), Residual(channels, channels))


def residuals(channels: int, out: int, count: int, groups: int = 32, *, bias: bool = True) -> nn.Sequential:
    """Return a Sequential of residual blocks; the first changes the number of channels."""
    return nn.Sequential(*(Residual(out if i else channels, out, groups, bias=bias) for i in range(count)))


def norm(channels: int, groups: int = 32, *, affine: bool = True) -> nn.GroupNorm:
    """Return a GroupNorm with 32 groups, or with their greatest common divisor with ``channels``."""
    return nn.GroupNorm(gcd(groups, channels), channels, eps=1e-6, affine=affine)
