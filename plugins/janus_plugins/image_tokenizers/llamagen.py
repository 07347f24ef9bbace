"""LlamaGen's VQ model: the image tokenizer of Janus and Janus-Pro (VQ-16), and its sibling VQ-8.

A convolutional encoder shrinks the picture, each latent is replaced by the nearest row of a codebook,
and a convolutional decoder paints the picture anew. Fully convolutional: any height and width that are
multiples of ``factor`` work. VQ-16 is the default; VQ-8 is ``channel_multipliers: [1, 2, 2, 4]``.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import gcd
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import CheckpointError, ImageTokenizer, PartConfig, Registry, hookimpl
from janus_plugins.sizes import check_sizes


@dataclass
class LlamaGenConfig(PartConfig):
    """The published VQ-16: factor 16, 71.883 M parameters."""

    channels: int = 128  # of the highest resolution
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # one per resolution
    residual_blocks: int = 2  # per resolution; the decoder has one more
    latent_channels: int = 256  # between the convolutions and the projection to a code
    num_codes: int = 16384  # K
    code_width: int = 8
    l2_norm: bool = True  # codes and latents are compared, and decoded, at unit length
    reconstruction: Literal["l1", "l2"] = "l2"  # the distance of the loss "pixels"
    commitment: float = 0.25  # weight of the loss that pulls latents to their codes
    entropy: float = 0.0  # weight of the loss that spreads the codes' use; 0: not computed
    entropy_temperature: float = 0.01  # of the soft assignment of latents to codes in it

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
            code_width=1,
        )


class LlamaGenTokenizer(nn.Module):
    """Pictures in [-1, 1] to code ids and back; runs in the dtype of its weights.

    Both codebook rows and latents are normalised in ``encode``, rows alone in ``decode``: the published
    codebook's rows are not of unit length, and comparing them as they are finds other codes.
    """

    value_range = (-1.0, 1.0)

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks: tuple[int, ...] = (config.num_codes,)
        self.code_width: int | None = config.code_width
        self.factor = 2 ** (len(config.channel_multipliers) - 1)
        self.encoder = make_encoder(config)
        self.decoder = make_decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """One code for each square of ``factor`` pixels."""
        if height % self.factor or width % self.factor or not height or not width:
            raise ValueError(f"llamagen: {height}x{width} is no multiple of {self.factor} on both sides")
        return height // self.factor, width // self.factor

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into code ids (N, P)."""
        return self.quantize.nearest(self._latents(pixels))

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids (N, P) into pixels (N, 3, height, width), not clipped to the range."""
        grid = self.grid(height, width)
        if codes.shape[-1] != grid[0] * grid[1]:
            raise ValueError(f"llamagen: {codes.shape[-1]} codes do not fill a grid of {grid[0]}x{grid[1]}")
        return self._paint(self.quantize(codes), grid)

    def code_vectors(self) -> Tensor:
        """Return the codebook (K, code_width) as it is compared: rows of unit length."""
        return self.quantize.vectors()

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``pixels``, ``codebook``, ``commitment`` and, where weighted, ``entropy``; sum them.

        Gradients pass the nearest-row choice straight through (van den Oord et al. 2017). The published
        tokenizers were trained with a perceptual and an adversarial loss besides.
        """
        latents = self._latents(pixels)  # (N, P, code_width)
        vectors = self.quantize(self.quantize.nearest(latents))
        passed = latents + (vectors - latents).detach()
        painted = self._paint(passed, self.grid(*pixels.shape[-2:]))
        distance = F.l1_loss if self.config.reconstruction == "l1" else F.mse_loss
        losses = {
            "pixels": distance(painted, pixels.to(painted.dtype)),
            "codebook": F.mse_loss(vectors, latents.detach()),
            "commitment": self.config.commitment * F.mse_loss(latents, vectors.detach()),
        }
        if self.config.entropy:
            losses["entropy"] = self.config.entropy * self.quantize.entropy_loss(latents)
        return losses

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read LlamaGen's files, or the tokenizer inside a published or a transformers Janus checkpoint.

        Wherever the names begin (``ema.``, ``model.``, ``gen_vision_model.``, ``model.vqmodel.``), they
        are those before the codebook's; ``ema`` comes first where a file holds several, as in LlamaGen.
        """
        anchor = "quantize.embedding.weight"
        prefixes = [name.removesuffix(anchor) for name in weights if name.endswith(anchor)]
        if not prefixes:
            raise CheckpointError(
                f"llamagen found no codebook: no name ends in '{anchor}'; offer LlamaGen's or Janus'"
            )
        prefix = min(prefixes, key=lambda found: not found.startswith("ema."))
        known = self.state_dict().keys()
        for name in weights:
            own = published_name(name.removeprefix(prefix)) if name.startswith(prefix) else ""
            if own in known:
                yield own, weights[name]
            elif own == "quantize.codebook_used":
                _ = weights[name]  # statistics of its training: read, so that it does not count as left over

    def _latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into latents (N, P, code_width), at unit length with ``l2_norm``."""
        self.grid(*pixels.shape[-2:])
        encoded = self.quant_conv(self.encoder(pixels.to(self.quant_conv.weight.dtype)))  # (N, c, h, w)
        return self.quantize.normalize(encoded.flatten(2).transpose(1, 2))

    def _paint(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Paint code vectors (N, P, code_width) as pixels."""
        latents = vectors.transpose(1, 2).unflatten(2, grid)  # (N, code_width, h, w)
        return self.decoder(self.post_quant_conv(latents))


class Codebook(nn.Module):
    """K vectors, and which of them is nearest."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.num_codes, config.code_width)
        nn.init.uniform_(self.embedding.weight, -1 / config.num_codes, 1 / config.num_codes)
        self.embedding.weight.data = self.normalize(self.embedding.weight.data)

    def normalize(self, vectors: Tensor) -> Tensor:
        """Bring vectors (..., code_width) to unit length, where the config says so."""
        return F.normalize(vectors, dim=-1) if self.config.l2_norm else vectors

    def vectors(self) -> Tensor:
        """Return all vectors (K, code_width)."""
        return self.normalize(self.embedding.weight)

    def forward(self, codes: Tensor) -> Tensor:
        """Look up code ids (...) as vectors (..., code_width)."""
        return self.normalize(self.embedding(codes))

    def scores(self, latents: Tensor) -> Tensor:
        """Score all codes (..., K) for latents z (..., code_width): |z|² minus the squared distance.

        In float32 whatever the weights are: 16,384 codes lie closer together than bf16 can tell apart.
        """
        vectors = self.vectors().float()
        return 2 * latents.float() @ vectors.T - vectors.square().sum(-1)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the ids (...) of the codes nearest to latents (..., code_width)."""
        return self.scores(latents).argmax(-1)

    def entropy_loss(self, latents: Tensor) -> Tensor:
        """Reward sure choices and an even use: mean H(p) - H(mean p), p = softmax(scores / temperature)."""
        logits = self.scores(latents).flatten(0, -2) / self.config.entropy_temperature  # (N*P, K)
        choice = logits.softmax(-1)
        unsure = -(choice * logits.log_softmax(-1)).sum(-1).mean()
        use = choice.mean(0)
        return unsure + (use * (use + 1e-5).log()).sum()


def make_encoder(config: LlamaGenConfig) -> nn.Sequential:
    """Pixels (N, 3, H, W) to latents (N, latent_channels, H / factor, W / factor)."""
    widths = [config.channels * multiplier for multiplier in [1, *config.channel_multipliers]]
    levels = [Level(width, wide, config.residual_blocks) for width, wide in pairwise(widths)]
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


def make_decoder(config: LlamaGenConfig) -> nn.Sequential:
    """Latents (N, latent_channels, h, w) to pixels (N, 3, h * factor, w * factor)."""
    multipliers = config.channel_multipliers[::-1]
    widths = [config.channels * multiplier for multiplier in [multipliers[0], *multipliers]]
    levels = [Level(width, wide, config.residual_blocks + 1) for width, wide in pairwise(widths)]
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


class Residual(nn.Module):
    """Two convolutions, added to their input: (N, width, h, w) to (N, wide, h, w)."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, wide, 3, padding=1)
        self.norm2, self.conv2 = norm(wide), nn.Conv2d(wide, wide, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == wide else nn.Conv2d(width, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class Attention(nn.Module):
    """One head over all positions of (N, width, h, w), added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
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


def norm(width: int) -> nn.GroupNorm:
    """Normalise in 32 groups, as published; at widths that 32 does not divide, in as many as do divide."""
    return nn.GroupNorm(gcd(32, width), width, eps=1e-6)


def published_name(name: str) -> str:
    """Turn transformers' names into the published ones; those stay as they are."""
    name = re.sub(r"\.(down|up)\.(\d+)\.", r".conv_blocks.\2.", name).replace(".block.", ".res.")
    for i, theirs in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{theirs}.", f".mid.{i}.")
    return name


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Offer this tokenizer."""
    registry.add("llamagen", LlamaGenTokenizer, LlamaGenConfig)
