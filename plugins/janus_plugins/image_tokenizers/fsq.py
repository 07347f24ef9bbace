"""The image tokenizer `fsq`, NVIDIA Cosmos', by finite scalar quantisation.

Each of the six numbers of a latent is bounded and rounded to one of 8 or 5 levels (Mentzer et al.
2023): 8 * 8 * 8 * 5 * 5 * 5 = 64,000 codes, without a learnt codebook.
The convolutions start from Haar wavelets of small patches, at a quarter of the size.
Layers and names are those of NVIDIA's Cosmos-Tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import log2, prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    CheckpointError,
    ComponentConfig,
    DescriptionError,
    Difference,
    ImageTokenizer,
    Reconstruction,
    Registry,
    belongs_to,
    hookimpl,
)
from janus_plugins.image_tokenizers.convolutional import Attention, BlockLevel, Residual, named, norm
from janus_plugins.sizes import check_sizes, squares

CONSTANTS = ("encoder.patcher.", "decoder.unpatcher.", "quantizer.")
"""Prefixes of wavelets and tables in published files, which are computed here."""


@dataclass
class FsqConfig(ComponentConfig):
    """The published DI16x16, 83.724 M parameters; DI8x8 is ``factor: 8``.

    Tokenizers of 360p have ``patch_size: 2``, and DI16x16-360p ``norm_groups: 1`` besides. Published folders
    describe none of this, and weights do not show ``norm_groups``: group normalisation has a scale and a
    shift for each channel, whatever the groups. ``levels`` are compared with the tables in a file.
    """

    channels: int = 128  # before the first resolution
    channel_multipliers: list[int] = field(default_factory=lambda: [2, 4, 4])  # one per resolution
    residual_blocks: int = 2  # per resolution; the decoder has one more
    patch_size: int = 4  # pixels a side that become wavelets; a power of two
    factor: int = 16  # pixels a side of a code, wavelets included; a power of two
    latent_channels: int = 256  # between the convolutions and the projection to a code
    levels: list[int] = field(default_factory=lambda: [8, 8, 8, 5, 5, 5])  # of each number of a code
    norm_groups: int = 32  # of group normalisation, where they divide the channels

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("channel_multipliers", "levels"):
            if not getattr(self, name):
                raise ValueError(f"{name}: []; expected at least one.")
        check_sizes(
            self,
            channels=1,
            channel_multipliers=1,
            residual_blocks=1,
            patch_size=1,
            factor=1,
            latent_channels=1,
            levels=2,
            norm_groups=1,
        )
        for name in ("patch_size", "factor"):
            if not log2(getattr(self, name)).is_integer():
                raise ValueError(f"{name}: {getattr(self, name)}; expected a power of two.")
        if not 0 <= self.halvings <= len(self.channel_multipliers):
            raise ValueError(
                f"factor {self.factor} takes {self.halvings} halvings after patches of {self.patch_size};"
                f" expected 0 to {len(self.channel_multipliers)}, the number of channel_multipliers."
            )

    @property
    def halvings(self) -> int:
        """How often the convolutions halve the grid, after the wavelets."""
        return int(log2(self.factor)) - int(log2(self.patch_size))


class FsqTokenizer(nn.Module):
    """Images in [-1, 1] to code ids and back; runs in the dtype of its weights, rounds in float32.

    A code's number counts the levels of its first number first. Its vector has a number for each of
    ``levels``, from -1 to 1.
    """

    value_range = (-1.0, 1.0)
    levels: Tensor
    steps: Tensor

    def __init__(self, config: FsqConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks: tuple[int, ...] = (prod(config.levels),)
        self.code_dim: int | None = len(config.levels)
        self.factor = config.factor
        self.encoder = build_encoder(config)
        self.decoder = build_decoder(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, self.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.code_dim, config.latent_channels, 1)
        steps = [prod(config.levels[:i]) for i in range(len(config.levels))]
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)  # (code_dim,)
        self.register_buffer("steps", torch.tensor(steps), persistent=False)  # from a level to the next

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of codes: one for each square of ``factor`` pixels."""
        return squares("fsq", height, width, self.factor)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into code ids (N, P)."""
        return self._codes(self._bounded(self._latents(pixels)))

    def _codes(self, bounded: Tensor) -> Tensor:
        """Return the ids (N, P) of bounded latents (N, P, code_dim)."""
        return ((bounded.round().to(torch.int64) + self.levels // 2) * self.steps).sum(-1)

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids (N, P) into pixels (N, 3, height, width), not clipped to the range."""
        grid = self.grid(height, width)
        if codes.shape[-1] != grid[0] * grid[1]:
            raise ValueError(f"fsq: {codes.shape[-1]} codes do not fill a grid of {grid[0]}x{grid[1]}")
        return self._decode_vectors(self.vectors(codes), grid)

    def vectors(self, codes: Tensor) -> Tensor:
        """Return the vectors (..., code_dim) of code ids (...), in float32."""
        middle = self.levels // 2
        numbers = codes.unsqueeze(-1) // self.steps % self.levels
        return (numbers - middle).float() / middle

    def codebook_embeddings(self) -> Tensor:
        """Return the vectors (K, code_dim) of all codes, in the dtype of the weights."""
        codes = torch.arange(self.codebooks[0], device=self.levels.device)
        return self.vectors(codes).to(self.quant_conv.weight.dtype)

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``pixels`` (L1): rounding needs no loss of its own, and gradients pass it straight through.

        The published tokenizers were also trained with a perceptual and an adversarial loss.
        """
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode pixels (N, 3, H, W), with straight-through gradients."""
        bounded = self._bounded(self._latents(pixels))
        rounded = bounded + (bounded.round() - bounded).detach()
        decoded = self._decode_vectors(rounded / (self.levels // 2), self.grid(*pixels.shape[-2:]))
        return Reconstruction(decoded, {}, "l1", self._codes(bounded.detach()))

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the published weights, under any prefix (``network.``); constants are known.

        Raises:
            DescriptionError: the file's tables are of other levels.
            CheckpointError: the weights are not of such a tokenizer.
        """
        anchor = "encoder.conv_in.weight"
        prefix = next((name.removesuffix(anchor) for name in weights if name.endswith(anchor)), None)
        if prefix is None:
            raise CheckpointError(
                f"fsq found no encoder: no name ends in '{anchor}'; pass a DI tokenizer of Cosmos'"
            )
        for name in weights:
            own = name.removeprefix(prefix) if name.startswith(prefix) else ""
            if own.startswith(CONSTANTS):
                self._check_levels(own, weights[name])
            elif belongs_to(own, self):
                yield own, weights[name]

    def _check_levels(self, name: str, table: Tensor) -> None:
        """Check ``levels`` against a file's list of levels, or its table of codes."""
        file_levels = None
        if name.endswith("._levels"):
            file_levels = table.flatten().tolist()
        elif name.endswith(".implicit_codebook"):
            columns = table.reshape(-1, table.shape[-1]).float().unbind(-1)  # a number of each code (K,)
            file_levels = [len(column.unique()) for column in columns]
        if file_levels not in (None, self.config.levels):
            difference = Difference("levels", self.config.levels, file_levels)
            raise DescriptionError("the weight file", [difference])

    def _latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into latents (N, P, code_dim)."""
        self.grid(*pixels.shape[-2:])
        encoded = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype)))
        return encoded.flatten(2).transpose(1, 2)

    def _bounded(self, latents: Tensor) -> Tensor:
        """Bound latents so that rounding gives L integers from -(L // 2); an even L shifts by half."""
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (1 - self.levels % 2) * 0.5
        return (latents.float() + (offset / half).atanh()).tanh() * half - offset

    def _decode_vectors(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode code vectors (N, P, code_dim) into pixels."""
        latents = vectors.to(self.quant_conv.weight.dtype).transpose(1, 2).unflatten(2, grid)
        return self.decoder(self.post_quant_conv(latents))


def build_encoder(config: FsqConfig) -> nn.Sequential:
    """Build the encoder: pixels (N, 3, H, W) to latents (N, latent_channels, H / factor, W / factor)."""
    widths = [config.channels * multiplier for multiplier in [1, *config.channel_multipliers]]
    down = [BlockLevel(*pair, config.residual_blocks, config.norm_groups) for pair in pairwise(widths)]
    for level, channels in list(zip(down, widths[1:], strict=True))[: config.halvings]:
        pad = nn.ZeroPad2d((0, 1, 0, 1))  # at the right and the bottom only
        conv = nn.Conv2d(channels, channels, 3, stride=2)
        level.downsample = named(pad=pad, conv=conv)
    return named(
        patcher=Wavelets(config.patch_size),
        conv_in=nn.Conv2d(3 * config.patch_size**2, config.channels, 3, padding=1),
        down=nn.Sequential(*down),
        mid=middle(widths[-1], config.norm_groups),
        norm_out=norm(widths[-1], config.norm_groups),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1),
    )


def build_decoder(config: FsqConfig) -> nn.Sequential:
    """Build the decoder: latents (N, latent_channels, h, w) to pixels (N, 3, h * factor, w * factor)."""
    widths = [config.channels * multiplier for multiplier in config.channel_multipliers]
    inputs = [*widths[1:], widths[-1]]  # input channels of each resolution, finest first
    up = [
        BlockLevel(*pair, config.residual_blocks + 1, config.norm_groups)
        for pair in zip(inputs, widths, strict=True)
    ]
    for level, channels in list(zip(up, widths, strict=True))[len(up) - config.halvings :]:
        smooth = nn.Conv2d(channels, channels, 3, padding=1)
        level.upsample = named(repeat=nn.Upsample(scale_factor=2), conv=smooth)
    return named(
        conv_in=nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1),
        mid=middle(widths[-1], config.norm_groups),
        up=FromLast(*up),
        norm_out=norm(widths[0], config.norm_groups),
        swish=nn.SiLU(),
        conv_out=nn.Conv2d(widths[0], 3 * config.patch_size**2, 3, padding=1),
        unpatcher=Wavelets(config.patch_size, inverse=True),
    )


class Wavelets(nn.Module):
    """Haar wavelets: (N, C, H, W) to (N, C * size², H / size, W / size), the mean first, or the inverse."""

    def __init__(self, size: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.rounds, self.inverse = int(log2(size)), inverse

    def forward(self, x: Tensor) -> Tensor:
        """Transform x by squares of 2 x 2, repeatedly, up to squares of ``size``."""
        for _ in range(self.rounds):
            x = join(x) if self.inverse else cut(x)
        return x


def cut(x: Tensor) -> Tensor:
    """Map squares of 2 x 2 (N, C, 2h, 2w) to means and differences (N, 4 * C, h, w)."""
    return torch.cat(haar(*F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).unbind(2)), dim=1) / 4


def join(x: Tensor) -> Tensor:
    """Invert `cut`."""
    return F.pixel_shuffle(torch.stack(haar(*x.chunk(4, dim=1)), dim=2).flatten(1, 2), 2)


def haar(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Return sums of [[a, b], [c, d]]: all, by rows, columns and diagonals; applied twice, 4 times each."""
    return a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d


class FromLast(nn.Sequential):
    """A Sequential that runs its layers in reverse: they are numbered from the finest resolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers, the last first."""
        for layer in list(self)[::-1]:
            x = layer(x)
        return x


def middle(channels: int, groups: int) -> nn.Sequential:
    """Build the middle of encoder and decoder."""
    return named(
        block_1=Residual(channels, channels, groups),
        attn_1=Attention(channels, groups),
        block_2=Residual(channels, channels, groups),
    )


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register ``fsq``."""
    registry.add("fsq", FsqTokenizer, FsqConfig)
