"""The understanding encoder `vit`: a small vision transformer with a convolutional stem, trainable on a CPU.

Stride-2 convolutions replace the patch projection: training is faster and more stable on little data ("Early
convolutions help transformers see better", section 4).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_modular import ComponentConfig, PixelSpec, Registry, UnderstandingEncoder, hookimpl
from janus_plugins.sizes import check_heads, check_sizes


@dataclass
class VitConfig(ComponentConfig):
    """Sizes of a `Vit`."""

    feature_dim: int = 96  # C
    layers: int = 3  # transformer blocks
    heads: int = 4  # attention heads a block
    stem: list[int] = field(default_factory=lambda: [24, 48, 96])  # channels; each halves the grid
    pixels: PixelSpec = field(default_factory=lambda: PixelSpec(height=32, width=32))  # of training

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(self, feature_dim=1, layers=1, heads=1, stem=1)
        check_heads(self.feature_dim, self.heads)


class Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP of four times the dimension."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Transform features (N, P, C)."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (N, P, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, P, C / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Encodes images into features, one a grid cell; positions are interpolated for other image sizes."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_dim, self.pixels = config.feature_dim, config.pixels
        self.factor = 2 ** len(config.stem)
        self.native = self.grid(config.pixels.height, config.pixels.width)

        stem: list[nn.Module] = []
        for channels, out in zip([3, *config.stem], config.stem, strict=False):
            stem += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(1, out), nn.GELU()]
        self.stem = nn.Sequential(*stem, nn.Conv2d([3, *config.stem][-1], config.feature_dim, 1))
        self.positions = nn.Parameter(0.02 * torch.randn(1, config.feature_dim, *self.native))
        self.blocks = nn.Sequential(*(Block(config.feature_dim, config.heads) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.feature_dim)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of features: the stem's output."""
        if height % self.factor or width % self.factor:
            raise ValueError(f"vit: an image of {height}x{width} does not divide by its factor {self.factor}")
        return height // self.factor, width // self.factor

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        grid = self.grid(*pixels.shape[-2:])
        positions: Tensor = self.positions
        if self.pixels.multiple is not None or grid != self.native:  # exported for sizes of all images
            positions = F.interpolate(positions.float(), grid, mode="bicubic").to(positions.dtype)
        x = (self.stem(pixels) + positions).flatten(2).transpose(1, 2)  # (N, P, C)
        return self.norm(self.blocks(x))


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Register ``vit``."""
    registry.add("vit", Vit, VitConfig)
