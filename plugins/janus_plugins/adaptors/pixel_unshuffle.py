"""The adaptor `pixel-unshuffle`: concatenates the features of each square of the grid, then applies an MLP.

It is InternVL's connector (Chen et al. 2024, "How far are we to GPT-4V?", section 3.1, where it is called
pixel shuffle); with a factor of 2, it reduces the tokens to a quarter. SmolVLM and Idefics3 have it without
the norm: ``{norm: false, depth: 1, bias: false}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from janus_modular import Adaptor, ComponentConfig, Registry, hookimpl
from janus_plugins.sizes import check_sizes


@dataclass
class PixelUnshuffleConfig(ComponentConfig):
    """Options of the adaptor; the defaults are InternVL's."""

    factor: int = 2  # side of the squares, in features: factor² of them become one token
    norm: bool = True  # LayerNorm of the joined features
    depth: int = 2  # linear layers: factor² C -> D, then D -> D
    bias: bool = True  # of the linear layers

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(self, factor=1, depth=1)


class PixelUnshuffleAdaptor(nn.Module):
    """Maps features (N, P, C) to (N, P / factor², D), the coarser grid in raster order.

    The features of a square are concatenated in raster order.
    """

    def __init__(self, config: PixelUnshuffleConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.config = config
        joined = config.factor**2 * input_dim
        self.norm = nn.LayerNorm(joined) if config.norm else nn.Identity()
        layers: list[nn.Module] = [nn.Linear(joined, output_dim, bias=config.bias)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(output_dim, output_dim, bias=config.bias)]
        self.layers = nn.Sequential(*layers)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions: one for each square."""
        rows, columns = self.output_grid(grid)
        return rows * columns

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of squares; raise ValueError if the factor does not divide the grid."""
        factor = self.config.factor
        if grid[0] % factor or grid[1] % factor:
            raise ValueError(
                f"pixel-unshuffle: a grid of {grid[0]}x{grid[1]} features does not divide by its factor "
                f"{factor}: choose another factor, or an image size that gives an even grid"
            )
        return grid[0] // factor, grid[1] // factor

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features (N, P, C) of a grid to (N, P', D)."""
        factor, (rows, columns) = self.config.factor, self.output_grid(grid)
        x = features.unflatten(1, (rows, factor, columns, factor))  # (N, h, f, w, f, C)
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)  # (N, P', f * f * C)
        return self.layers(self.norm(x))

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the connector of InternVL, of transformers' InternVL, or of Idefics3 and SmolVLM."""
        for name in weights:
            if match := CONNECTOR.search(name):
                module, _, parameter = match[0].rpartition(".")
                yield f"{PUBLISHED[module]}.{parameter}" if module in PUBLISHED else name, weights[name]


CONNECTOR = re.compile(r"(?<![^.])(?:mlp1|multi_modal_projector|connector)\..+")
PUBLISHED = {  # modules by the ends of their names: InternVL's, transformers' InternVL's, Idefics3's
    "mlp1.0": "norm",
    "mlp1.1": "layers.0",
    "mlp1.3": "layers.2",
    "multi_modal_projector.layer_norm": "norm",
    "multi_modal_projector.linear_1": "layers.0",
    "multi_modal_projector.linear_2": "layers.2",
    "connector.modality_projection.proj": "layers.0",
}


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("pixel-unshuffle", PixelUnshuffleAdaptor, PixelUnshuffleConfig)
