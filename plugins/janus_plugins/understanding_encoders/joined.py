"""The understanding encoder `joined`: several encoders of one image, such as SigLIP and DINOv2 in Prismatic.

encoder:
  name: joined
  resize: crop
  encoders: [{name: hf-vision, pretrained: SIGLIP}, {name: hf-vision, pretrained: DINOV2}]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    ComponentConfig,
    ComponentSpec,
    ConfigError,
    PixelSpec,
    Registry,
    UnderstandingEncoder,
    component,
    hookimpl,
)


@dataclass
class JoinedConfig(ComponentConfig):
    """The encoders; each has its own ``pretrained`` and its own ``pixels`` (size, mean, std)."""

    encoders: list[ComponentSpec] = component(
        "understanding_encoders"
    )  # two or more; their grids must be equal
    resize: Literal["letterbox", "crop", "stretch"] | None = None  # None: the encoders', if equal


class Joined(nn.Module):
    """Concatenates the features (N, P, C) of several encoders; C is the sum of their feature_dim.

    Built as ``factory(config, build)``.

    The core prepares an image once, in the largest size of all encoders and without normalisation. Here, it
    is resized to each encoder's size (bilinear without antialiasing, which is the same in every runtime; keep
    the sizes similar) and normalised by the encoder's mean and std.

    Raises:
        ValueError: the encoders have different grids for an image; lists sizes with equal grids.
    """

    encoders: Any  # a ModuleList of understanding encoders

    def __init__(self, config: JoinedConfig, build: Callable[[ComponentSpec], Any]) -> None:
        super().__init__()
        if len(config.encoders) < 2:
            raise ConfigError(f"joined: found {len(config.encoders)} encoders; expected two or more")
        self.config = config
        encoders = [build(spec) for spec in config.encoders]
        self.encoders = nn.ModuleList(encoders)
        self.feature_dim: int = sum(encoder.feature_dim for encoder in encoders)
        specs: list[PixelSpec] = [encoder.pixels for encoder in encoders]
        for resize in ("native", "tiles"):
            if resize in {spec.resize for spec in specs}:
                raise ConfigError(
                    f"joined: found an encoder with pixels.resize {resize}; expected one size of images for"
                    " all encoders: set its pixels.resize to letterbox, crop or stretch"
                )
        rules = list(dict.fromkeys(spec.resize for spec in specs))
        if config.resize is None and len(rules) > 1:
            named = ", ".join(f"{self._name(i)}: {spec.resize}" for i, spec in enumerate(specs))
            raise ConfigError(
                f"joined: its encoders resize images differently ({named}), but they get the same"
                " image: set resize to letterbox, crop or stretch"
            )
        self.pixels = PixelSpec(
            height=max(spec.height for spec in specs),
            width=max(spec.width for spec in specs),
            resize=config.resize or rules[0],
            normalize=False,
            mean=specs[0].mean,  # used for the borders of a letterbox only
            fill=specs[0].fill,
            min_size=max(spec.min_size for spec in specs),
        )
        self.grid(self.pixels.height, self.pixels.width)  # checks that the grids are equal

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of features, which are equal for all encoders."""
        sizes = [self._size(encoder, height, width) for encoder in self.encoders]
        grids = [encoder.grid(*size) for encoder, size in zip(self.encoders, sizes, strict=True)]
        for i, grid_i in enumerate(grids):
            if grid_i != grids[0]:
                hints = [
                    f"{self._name(j)} has {_x(grid)} of {_x(size)} pixels"
                    for j, grid in ((i, grids[0]), (0, grid_i))
                    if (size := size_for(self.encoders[j], grid))
                ]
                raise ValueError(
                    f"joined: {self._name(0)} has {_x(grids[0])} features of {_x(sizes[0])} pixels, and"
                    f" {self._name(i)} {_x(grid_i)} of {_x(sizes[i])}; they must have equal grids. Set pixels"
                    f" of one of them: {', or '.join(hints) or 'no size that was tried gives equal grids'}"
                )
        return grids[0]

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) in [0, 1] into features (N, P, C)."""
        self.grid(*pixels.shape[-2:])
        return torch.cat([encoder(self._preprocess(encoder, pixels)) for encoder in self.encoders], dim=-1)

    def _size(self, encoder: UnderstandingEncoder, height: int, width: int) -> tuple[int, int]:
        """Return an encoder's image size for a joint image of height x width."""
        own = encoder.pixels
        return round(height * own.height / self.pixels.height), round(width * own.width / self.pixels.width)

    def _preprocess(self, encoder: UnderstandingEncoder, pixels: Tensor) -> Tensor:
        """Resize and normalise pixels (N, 3, H, W) for an encoder."""
        size, spec = self._size(encoder, pixels.shape[-2], pixels.shape[-1]), encoder.pixels
        x = pixels.float()
        if size != tuple(pixels.shape[-2:]):
            x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        if spec.normalize:
            mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (spec.mean, spec.std))
            x = (x - mean) / std
        return x.to(pixels.dtype)

    def _name(self, index: int) -> str:
        return f"encoders[{index}] ({self.config.encoders[index].name})"


def _x(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def size_for(encoder: UnderstandingEncoder, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Return the smallest image size (height, width) with a grid; None if there is none up to 2048 pixels."""
    height = width = None
    for side in range(1, 2049):
        try:
            rows, columns = encoder.grid(side, side)
        except ValueError:
            continue
        height = height or (side if rows == grid[0] else None)
        width = width or (side if columns == grid[1] else None)
        if height and width:
            return height, width
    return None


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Register this encoder."""
    registry.add("joined", Joined, JoinedConfig)
