"""The convolutional tokenizer that began with VQGAN: all of it but how it learns and whose weights it reads.

An encoder of residual blocks halves the image from level to level, each latent is replaced by a row of a
codebook, and a mirrored decoder paints the image anew (Esser et al. 2021, table 7). Fully convolutional:
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
        """Refuse sizes that cannot be built."""
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

    A tokenizer made of it adds its name, its losses, and ``read_pretrained``.
    """

    name: ClassVar[str]  # as registered
    value_range = (-1.0, 1.0)

    def __init__(self, config: ConvolutionalConfig, quantize: Codebook, *, attention: bool = True) -> None:
        super().__init__()
        self.codebooks: tuple[int, ...] = (config.num_codes,)
        self.code_dim: int | None = config.code_dim
        self.factor = 2 ** (len(config.channel_multipliers) - 1)
        self.encoder = make_encoder(config, attention)
        self.decoder = make_decoder(config, attention)
        self.quantize = quantize
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """One code for each square of ``factor`` pixels."""
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
        return self.paint(self.quantize(codes), grid)

    def codebook_embeddings(self) -> Tensor:
        """Return the codebook (K, code_dim) as it is compared."""
        return self.quantize.vectors()

    def latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into latents (N, P, code_dim), as the codebook compares them."""
        self.grid(*pixels.shape[-2:])
        encoded = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype)))  # (N, c, h, w)
        return self.quantize.normalize(encoded.flatten(2).transpose(1, 2))

    def paint(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Paint code vectors (N, P, code_dim) as pixels."""
        latents = vectors.transpose(1, 2).unflatten(2, grid)  # (N, code_dim, h, w)
        return self.decoder(self.post_quant_conv(latents))


def make_encoder(config: ConvolutionalConfig, attention: bool) -> nn.Sequential:
    """Pixels (N, 3, H, W) to latents (N, latent_channels, H / factor, W / factor)."""
    widths = [config.channels * multiplier for multiplier in [1, *config.channel_multipliers]]
    levels = [Level(width, wide, config.residual_blocks) for width, wide in pairwise(widths)]
    if attention:
        levels[-1].attend()
    for level in levels[:-1]:  # padded on the right and at the bottom alone
        halve = nn.Conv2d(level.width, level.width, 3, stride=2)
        level.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=halve)
    return named(
        conv_in=nn.Conv2d(3, config.channels, 3, padding=1),
        conv_blocks=nn.Sequential(*levels),
        mid=middle(widths[-1]),
        norm_out=norm(widths[-1]),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1),
    )


def make_decoder(config: ConvolutionalConfig, attention: bool) -> nn.Sequential:
    """Latents (N, latent_channels, h, w) to pixels (N, 3, h * factor, w * factor)."""
    multipliers = config.channel_multipliers[::-1]
    widths = [config.channels * multiplier for multiplier in [multipliers[0], *multipliers]]
    levels = [Level(width, wide, config.residual_blocks + 1) for width, wide in pairwise(widths)]
    if attention:
        levels[0].attend()
    for level in levels[:-1]:
        smooth = nn.Conv2d(level.width, level.width, 3, padding=1)
        level.upsample = named(repeat=nn.Upsample(scale_factor=2), conv=smooth)
    return named(
        conv_in=nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
        mid=middle(widths[0]),
        conv_blocks=nn.Sequential(*levels),
        norm_out=norm(widths[-1]),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 3, 3, padding=1),
    )


class Level(nn.Module):
    """The blocks of one resolution and the way to the next: (N, width, h, w) to (N, wide, h', w')."""

    def __init__(self, width: int, wide: int, blocks: int) -> None:
        super().__init__()
        self.width = wide
        self.res = nn.ModuleList(Residual(wide if i else width, wide) for i in range(blocks))
        self.attn = nn.ModuleList(nn.Identity() for _ in range(blocks))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def attend(self) -> None:
        """Follow each residual block by attention: the published models do so at the lowest resolution."""
        self.attn = nn.ModuleList(Attention(self.width) for _ in self.res)

    def forward(self, x: Tensor) -> Tensor:
        for residual, attention in zip(self.res, self.attn, strict=True):
            x = attention(residual(x))
        return self.upsample(self.downsample(x))


class BlockLevel(nn.Module):
    """The same without attention, and under the names of later tokenizers: ``block.0`` and so on."""

    def __init__(self, width: int, wide: int, blocks: int, groups: int = 32, *, bias: bool = True) -> None:
        super().__init__()
        self.block = residuals(width, wide, blocks, groups, bias=bias)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.downsample(self.block(x)))


class Residual(nn.Module):
    """Two convolutions, added to their input: (N, width, h, w) to (N, wide, h, w)."""

    def __init__(self, width: int, wide: int, groups: int = 32, *, bias: bool = True) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width, groups), nn.Conv2d(width, wide, 3, padding=1, bias=bias)
        self.norm2, self.conv2 = norm(wide, groups), nn.Conv2d(wide, wide, 3, padding=1, bias=bias)
        self.nin_shortcut = nn.Identity() if width == wide else nn.Conv2d(width, wide, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class Attention(nn.Module):
    """One head over all positions of (N, width, h, w), added to its input."""

    def __init__(self, width: int, groups: int = 32) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (
            layer(y).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v)
        )  # (N, 1, P, width): graphs know attention with an axis of heads only
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:])
        return x + self.proj_out(y)


def named(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under names of their own."""
    return nn.Sequential(OrderedDict(layers))


def middle(width: int) -> nn.Sequential:
    """Build what both halves have at the lowest resolution: residual, attention, residual."""
    return nn.Sequential(Residual(width, width), Attention(width), Residual(width, width))


def residuals(width: int, wide: int, count: int, groups: int = 32, *, bias: bool = True) -> nn.Sequential:
    """Chain residual blocks; the first widens."""
    return nn.Sequential(*(Residual(wide if i else width, wide, groups, bias=bias) for i in range(count)))


def norm(width: int, groups: int = 32, *, affine: bool = True) -> nn.GroupNorm:
    """Normalise in 32 groups, as published; at widths that they do not divide, in as many as do divide."""
    return nn.GroupNorm(gcd(groups, width), width, eps=1e-6, affine=affine)
