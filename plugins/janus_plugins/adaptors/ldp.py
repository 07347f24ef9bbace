"""The adaptor `ldp`, MobileVLM's lightweight downsample projector: an MLP, then depthwise convolutions.

It reduces the tokens to a quarter (Chu et al. 2023, "MobileVLM"). Its two blocks are those of MobileNetV3
(Howard et al. 2019, figure 4) without the expansion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import Adaptor, CheckpointError, ComponentConfig, Registry, hookimpl


@dataclass
class LdpConfig(ComponentConfig):
    """The published projector has no options."""


class LdpAdaptor(nn.Module):
    """Maps features (N, P, C) of a grid h x w to (N, ceil(h / 2) * ceil(w / 2), D), rows first."""

    def __init__(self, config: LdpConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(
            nn.Linear(input_dim, output_dim), nn.GELU(), nn.Linear(output_dim, output_dim)
        )
        self.refine = MobileBlock(output_dim, stride=1)
        self.halve = MobileBlock(output_dim, stride=2)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions: every other row and column, from the first."""
        rows, columns = self.output_grid(grid)
        return rows * columns

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of every other row and column, from the first."""
        return (grid[0] + 1) // 2, (grid[1] + 1) // 2

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Map features (N, P, C) of a grid to (N, P', D)."""
        x = self.mlp(features).transpose(1, 2).unflatten(2, grid)  # (N, D, h, w)
        x = self.halve(x + self.refine(x))
        return x.flatten(2).transpose(1, 2)

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the projector of a MobileVLM checkpoint (its first version: ``ldpnet``)."""
        prefixes = [name.removesuffix(ANCHOR) for name in weights if name.endswith(ANCHOR)]
        if not prefixes:
            raise CheckpointError(
                f"ldp found no projector: no name ends in '{ANCHOR}'; pass a MobileVLM checkpoint"
            )
        for name in weights:
            source_name = name.removeprefix(prefixes[0])
            if name.startswith(prefixes[0]) and source_name.startswith(("mlp.", "mb_block.")):
                module, _, parameter = source_name.rpartition(".")
                yield f"{PUBLISHED[module]}.{parameter}" if module in PUBLISHED else name, weights[name]


class MobileBlock(nn.Module):
    """A depthwise convolution, a gate for each channel, and a pointwise convolution.

    (N, D, h, w) to (N, D, ceil(h / stride), ceil(w / stride)).
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.depthwise_norm = ChannelNorm(channels)
        self.squeeze = nn.Conv2d(channels, gate_dim(channels), 1)
        self.excite = nn.Conv2d(gate_dim(channels), channels, 1)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise_norm(self.depthwise(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))  # (N, D, 1, 1)
        return self.pointwise_norm(self.pointwise(x * F.hardsigmoid(gate)))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position of (N, D, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def gate_dim(channels: int) -> int:
    """Return the gate's hidden dimension in MobileNetV3: about a quarter, rounded to a multiple of 8."""
    quarter = channels // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


ANCHOR = "mb_block.1.block.0.0.weight"
BLOCK = {  # a block's modules, as torchvision's InvertedResidual counts them
    "0.0": "depthwise",
    "0.1": "depthwise_norm",
    "1.fc1": "squeeze",
    "1.fc2": "excite",
    "2.0": "pointwise",
    "2.1": "pointwise_norm",
}
PUBLISHED = {
    "mlp.1": "mlp.0",
    "mlp.3": "mlp.2",
    **{
        f"mb_block.{i}.block.{source_name}": f"{block}.{native_name}"
        for i, block in ((1, "refine"), (2, "halve"))
        for source_name, native_name in BLOCK.items()
    },
}


@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    """Register this adaptor."""
    registry.add("ldp", LdpAdaptor, LdpConfig)
