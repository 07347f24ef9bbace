"""The understanding path: images of one size, or each of its own, as embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from janus_modular.capabilities import ReshapesGrid
from janus_modular.interfaces import Adaptor, PixelSpec, UnderstandingEncoder
from janus_modular.model.batch import MixedImages


class Understanding(nn.Module):
    """The understanding path: normalises, encodes and adapts images."""

    def __init__(self, encoder: UnderstandingEncoder, adaptor: Adaptor) -> None:
        super().__init__()
        self.encoder = encoder
        self.adaptor = adaptor
        spec = encoder.pixels
        grid = encoder.grid(spec.height, spec.width)
        if min(grid) < 1:
            raise ValueError(
                f"the encoder has {grid[0]}x{grid[1]} features of an image of {spec.height}x{spec.width}"
                " pixels; expected at least 1x1: give it larger pixels"
            )
        self.num_tokens = adaptor.num_tokens(grid)  # of an image; in native size, of the largest
        self.grid = self._output_grid(spec.height, spec.width)  # of its positions, None if they have none
        self.tokens_follow_size = spec.resize == "native" and self._follows_size(spec)

    def _output_grid(self, height: int, width: int) -> tuple[int, int] | None:
        grid = self.encoder.grid(height, width)
        if isinstance(self.adaptor, ReshapesGrid):
            return self.adaptor.output_grid(grid)
        return grid if self.adaptor.num_tokens(grid) == grid[0] * grid[1] else None

    def _follows_size(self, spec: PixelSpec) -> bool:
        """Return True if images of native size have a position per square, False if all have as many.

        Raises:
            ValueError: the encoder or the adaptor cannot take a size, or makes other positions of it.
        """
        side = spec.multiple or 1
        most = (spec.height // side) * (spec.width // side)
        sizes = [(rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
        counts, grids = set(), set()
        for rows, columns in sizes:
            height, width = rows * side, columns * side
            try:
                counts.add((self.adaptor.num_tokens(self.encoder.grid(height, width)), rows * columns))
                grids.add(self._output_grid(height, width) in ((rows, columns), None))
            except ValueError as error:
                raise ValueError(
                    f"an image of {height}x{width} pixels, which pixels.resize=native may make: {error}."
                    " Choose another pixels.multiple, or another adaptor"
                ) from error
        if all(count == squares for count, squares in counts) and grids == {True}:
            return True
        if {count for count, _ in counts} == {self.num_tokens}:
            return False
        different = next((count, squares) for count, squares in sorted(counts) if count != squares)
        raise ValueError(
            f"pixels.multiple: found {side}; expected the side of a position in pixels: an image of"
            f" {different[1]} squares has {different[0]} positions"
        )

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return pixels (N, 3, H, W), uint8 or in [0, 1], as the encoder's `PixelSpec` normalises them."""
        return normalized(pixels, self.encoder.pixels).to(next(self.parameters()).dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embeddings (N, P, D) of images (N, 3, H, W)."""
        features = self.encoder(self.normalize(pixels))  # (N, P, C)
        return self.adaptor(features, self.encoder.grid(*pixels.shape[-2:]))

    def embed(self, images: Tensor | MixedImages) -> Tensor:
        """Return the embeddings (M, D) of all positions of images, in their order.

        Images of one size go through the encoder together.
        """
        if isinstance(images, Tensor):
            return self(images).flatten(0, 1)
        return images.joined([self(group) for group in images.groups])


def normalized(pixels: Tensor, spec: PixelSpec) -> Tensor:
    """Return pixels (N, 3, H, W), uint8 or in [0, 1], as floats, normalised as ``spec`` says."""
    x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if spec.normalize:
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (spec.mean, spec.std))
        x = (x - mean) / std
    return x
