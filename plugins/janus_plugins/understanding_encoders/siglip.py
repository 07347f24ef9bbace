"""SigLIP, the understanding encoder of Janus and Janus-Pro: every patch of the picture becomes a feature.

The sizes of the known ones (width, layers, heads, intermediate, patch_size, image_size):
    base/16-224     768, 12, 12, 3072, 16, 224
    large/16-384   1024, 24, 16, 4096, 16, 384   Janus and Janus-Pro, 303.689 M parameters
    so400m/14-384  1152, 27, 16, 4304, 14, 384
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from janus_modular import (
    CheckpointError,
    ConfigError,
    PartConfig,
    PixelSpec,
    Registry,
    UnderstandingEncoder,
    hookimpl,
    lies_in,
)
from janus_plugins.sizes import check_heads, check_sizes


@dataclass
class SiglipConfig(PartConfig):
    """The published L/16-384; see this module's docstring for the others' numbers."""

    width: int = 1024  # C
    layers: int = 24  # transformer blocks
    heads: int = 16  # of attention
    intermediate: int = 4096  # width inside each MLP
    patch_size: int = 16  # pixels
    image_size: int = 384  # side of the square pictures that the position table is for, in pixels
    activation: Literal["gelu", "gelu_pytorch_tanh"] = "gelu"  # Janus: gelu; Google's releases: the tanh one
    select_layer: int = -1  # the last block that is run: -1 the last, -2 the one before it, 2 the second
    pixels: PixelSpec = field(default_factory=PixelSpec)  # of any size: positions are interpolated

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        check_sizes(self, width=1, layers=1, heads=1, intermediate=1, patch_size=1, image_size=1)
        check_heads(self.width, self.heads)


class SiglipEncoder(nn.Module):
    """transformers' SigLIP vision tower without its pooling head, cut after ``select_layer``.

    Features are all patch tokens of the last block that is left, after the final LayerNorm. Blocks
    that are cut off are not built.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.pixels = config.pixels
        self.model = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.intermediate,
                num_hidden_layers=kept_layers(config),
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_act=config.activation,
                layer_norm_eps=1e-6,
                vision_use_head=False,
            )
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """One for each whole patch; what is left over at the right and at the bottom is not seen."""
        return height // self.config.patch_size, width // self.config.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        native = (self.config.image_size, self.config.image_size)
        output = self.model(pixels, interpolate_pos_encoding=tuple(pixels.shape[-2:]) != native)
        return output.last_hidden_state

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the published tower (timm's names), transformers' SigLIP, or transformers' Janus.

        A position table for pictures of another size is interpolated to this one's.
        """
        for name in weights:
            for anchor, rename in ANCHORS.items():
                if name.endswith(anchor):
                    return self._read(weights, name.removesuffix(anchor), rename)
        raise CheckpointError(
            f"siglip found no vision tower: no name ends in {' or '.join(map(repr, ANCHORS))} among "
            f"{sorted(weights)[:5]}, ...; offer a SigLIP or a Janus checkpoint"
        )

    def _read(
        self, weights: Mapping[str, Tensor], prefix: str, rename: Renaming
    ) -> Iterator[tuple[str, Tensor]]:
        for name in weights:
            if not name.startswith(prefix):
                continue  # of another part of the model
            inside = name.removeprefix(prefix)
            if inside.startswith(UNUSED):
                _ = weights[name]  # read, so that it does not count as left over
            own = rename(inside)
            if lies_in(own[0], self.model) and not self._passed_over(own[0]):
                for one, tensor in zip(own, weights[name].chunk(len(own)), strict=True):
                    yield f"model.{one}", self._fitted(tensor) if "position_embedding" in one else tensor

    def _passed_over(self, name: str) -> bool:
        """Say whether a weight may be left over: of a block that ``select_layer`` cuts off, or ids."""
        block = re.match(r"encoder\.layers\.(\d+)\.", name)
        cut_off = range(kept_layers(self.config), self.config.layers)
        return name == "embeddings.position_ids" or (block is not None and int(block[1]) in cut_off)

    def _fitted(self, table: Tensor) -> Tensor:
        """Bring a position table (P, C) to this model's size, as transformers does at run time."""
        table = table.squeeze(0)  # timm's has a dimension for the batch
        side, wanted = int(len(table) ** 0.5), self.config.image_size // self.config.patch_size
        if side == wanted or side**2 != len(table):
            return table  # one that is no square is left to the loader's report
        grid = table.T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
        return grid.flatten(2)[0].T.contiguous()


def kept_layers(config: SiglipConfig) -> int:
    """Count the blocks up to ``select_layer``: -1 all, -2 all but one, n the first n (the published rule)."""
    chosen = config.select_layer
    kept = min(config.layers, chosen if chosen > 0 else config.layers + chosen + 1)
    if kept < 1:
        raise ConfigError(f"siglip: select_layer {chosen} leaves no block; the least is -{config.layers}")
    return kept


def from_timm(name: str) -> list[str]:
    """Return SigLIP's names for one of timm's: three for fused queries, keys and values."""
    for theirs, ours in TIMM_NAMES.items():
        name = re.sub(theirs, ours, name)
    return [name.replace(".qkv.", f".{one}_proj.") for one in "qkv"] if ".qkv." in name else [name]


def from_transformers(name: str) -> list[str]:
    """Return SigLIP's names for one of SigLIP's own, or of transformers' Janus."""
    return [name.replace(".projection_layer.", ".out_proj.")]


Renaming = Callable[[str], list[str]]
ANCHORS: dict[str, Renaming] = {  # how a tower is recognised, and where its names begin
    "patch_embed.proj.weight": from_timm,
    "embeddings.patch_embedding.weight": from_transformers,
}
UNUSED = ("attn_pool.", "head.")  # the pooling head, in checkpoints of either kind
TIMM_NAMES = {
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^pos_embed$": "embeddings.position_embedding.weight",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.norm([12])\.": r".layer_norm\1.",
}


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Offer this encoder."""
    registry.add("siglip", SiglipEncoder, SiglipConfig)
