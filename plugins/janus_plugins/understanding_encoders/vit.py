"""A compact vision transformer with a convolutional stem, small enough to be trained from scratch on a CPU.

Stride-2 convolutions instead of one large patch projection: they see edges before the grid is cut, and train
faster and more steadily on little data ("Early convolutions help transformers see better", section 4).
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
    pixels: PixelSpec = field(default_factory=lambda: PixelSpec(height=32, width=32))  # the size trained at

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        check_sizes(self, feature_dim=1, layers=1, heads=1, stem=1)
        check_heads(self.feature_dim, self.heads)


class Block(nn.Module):
    """One pre-norm transformer block: attention among all cells, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Refine features (N, P, C), shape kept."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (N, P, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, P, C / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Images to features, one a grid cell; other sizes than the configured one interpolate positions."""

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
        """One feature for each cell that the stem leaves."""
        if height % self.factor or width % self.factor:
            raise ValueError(f"vit: an image of {height}x{width} does not divide by its factor {self.factor}")
        return height // self.factor, width // self.factor

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        grid = self.grid(*pixels.shape[-2:])
        positions: Tensor = self.positions
        if grid != self.native:
            positions = F.interpolate(positions.float(), grid, mode="bicubic").to(positions.dtype)
        x = (self.stem(pixels) + positions).flatten(2).transpose(1, 2)  # (N, P, C)
        return self.norm(self.blocks(x))


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Offer ``vit``."""
    registry.add("vit", Vit, VitConfig)
