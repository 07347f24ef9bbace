"""SigLIP, the understanding encoder of Janus and Janus-Pro: every patch of the image becomes a feature.

The sizes of the known ones (width, layers, heads, intermediate, patch_size, image_size):
    base/16-224     768, 12, 12, 3072, 16, 224
    large/16-384   1024, 24, 16, 4096, 16, 384   Janus and Janus-Pro, 303.689 M parameters
    so400m/14-384  1152, 27, 16, 4304, 14, 384
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from janus_modular import (
    CheckpointError,
    ComponentConfig,
    ConfigError,
    DescriptionError,
    Difference,
    PixelSpec,
    Registry,
    UnderstandingEncoder,
    belongs_to,
    hookimpl,
    refuse_quantized,
    resolve_pretrained,
)
from janus_plugins.formats.preparation import read_json, read_pixels
from janus_plugins.formats.published_config import read_tower
from janus_plugins.formats.transformers_processor import read_preprocessor
from janus_plugins.hf_folders import describing_folder, read_config
from janus_plugins.hf_pixels import check_pixels, processor_settings
from janus_plugins.sizes import check_heads, check_sizes


@dataclass(frozen=True)
class Tower:
    """What a SigLIP's weights are of. The defaults are the published L/16-384, as Janus runs it."""

    feature_dim: int = 1024
    layers: int = 24
    heads: int = 16
    intermediate: int = 4096
    patch_size: int = 16
    image_size: int = 384
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    select_layer: int = -1


NOT_IN_SHAPES = ("heads", "activation")
"""What weights run with as well where it is wrong, and no file of weights says."""


Activation = Literal["gelu", "gelu_pytorch_tanh"]
ACTIVATIONS = get_args(Activation)


@dataclass
class SiglipConfig(ComponentConfig):
    """A tower by its numbers. None: as ``pretrained`` describes itself, without it that of L/16-384.

    A number that is written must be the same in the config.json of the folder, or beside the file, but for
    ``image_size``: positions are interpolated. Without a config.json, ``heads`` and ``activation`` must be
    written.
    """

    feature_dim: int | None = None  # C; L/16-384: 1024
    layers: int | None = None  # transformer blocks; 24
    heads: int | None = None  # of attention; 16
    intermediate: int | None = None  # width inside each MLP; 4096
    patch_size: int | None = None  # pixels; 16
    image_size: int | None = None  # side of the square images that the position table is for, in pixels; 384
    activation: Activation | None = None  # gelu; Google's releases: the tanh one
    layer_norm_eps: float | None = None  # 1e-6
    select_layer: int | None = (
        None  # the last block that is run: -1 the last, -2 the one before it, 2 the second
    )
    pixels: PixelSpec | None = None  # of any size; None: as the folder's files say, else of image_size

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        least = ("feature_dim", "layers", "heads", "intermediate", "patch_size", "image_size")
        check_sizes(self, **{name: 1 for name in least if getattr(self, name) is not None})
        if self.feature_dim and self.heads:
            check_heads(self.feature_dim, self.heads)


class SiglipEncoder(nn.Module):
    """transformers' SigLIP vision tower without its pooling head, cut after ``select_layer``.

    Features are all patch tokens of the last block that is left, after the final LayerNorm. Blocks
    that are cut off are not built.
    """

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        path = resolve_pretrained(config.pretrained, config.revision) if config.pretrained else None
        folder = describing_folder(path) if path else None
        self.tower = tower = chosen_tower(config, path)
        check_heads(tower.feature_dim, tower.heads)
        self.feature_dim = tower.feature_dim
        spec = described_pixels(folder) if folder else {}
        size = {"height": tower.image_size, "width": tower.image_size}
        self.pixels = config.pixels or PixelSpec(**{**size, **spec})
        check_pixels(self.pixels, spec, folder)
        self.config = replace(config, pretrained=None, revision=None, pixels=self.pixels, **asdict(tower))
        self.model = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=tower.feature_dim,
                intermediate_size=tower.intermediate,
                num_hidden_layers=kept_layers(tower.layers, tower.select_layer),
                num_attention_heads=tower.heads,
                image_size=tower.image_size,
                patch_size=tower.patch_size,
                hidden_act=tower.activation,
                layer_norm_eps=tower.layer_norm_eps,
                vision_use_head=False,
            )
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """One for each whole patch; what is left over at the right and at the bottom is not seen."""
        return height // self.tower.patch_size, width // self.tower.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        native = (self.tower.image_size, self.tower.image_size)
        output = self.model(pixels, interpolate_pos_encoding=tuple(pixels.shape[-2:]) != native)
        return output.last_hidden_state

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the published tower (timm's names), transformers' SigLIP, or transformers' Janus.

        A position table for images of another size is interpolated to this one's.
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
                continue
            own = rename(inside)
            # Inside a larger model's tower, everything is the tower's; in a file of its own, text may be too.
            if (prefix or belongs_to(own[0], self.model)) and not self._passed_over(own[0]):
                for one, tensor in zip(own, weights[name].chunk(len(own)), strict=True):
                    yield f"model.{one}", self._fitted(tensor) if "position_embedding" in one else tensor

    def _passed_over(self, name: str) -> bool:
        """Say whether a weight may be left over: of a block that ``select_layer`` cuts off, or ids."""
        block = re.match(r"encoder\.layers\.(\d+)\.", name)
        cut_off = range(kept_layers(self.tower.layers, self.tower.select_layer), self.tower.layers)
        return name == "embeddings.position_ids" or (block is not None and int(block[1]) in cut_off)

    def _fitted(self, table: Tensor) -> Tensor:
        """Bring a position table (P, C) to this model's size, as transformers does at run time."""
        table = table.squeeze(0)  # timm's has a dimension for the batch
        side, wanted = int(len(table) ** 0.5), self.tower.image_size // self.tower.patch_size
        if side == wanted or side**2 != len(table):
            return table  # one that is no square is left to the loader's report
        grid = table.T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", align_corners=False)
        return grid.flatten(2)[0].T.contiguous()


def chosen_tower(config: SiglipConfig, path: Path | None) -> Tower:
    """Return the tower that the weights describe, or the one that is written where there are none.

    Raises:
        DescriptionError: a number that is written is another than the weights'.
        ConfigError: the weights do not say what their shapes cannot show, and neither does the config.
    """
    written = {key: value for key in asdict(Tower()) if (value := getattr(config, key)) is not None}
    described = described_tower(path) if path else {}
    differences = [
        Difference(key, value, described[key])
        for key, value in written.items()
        if key not in ("image_size", "select_layer") and key in described and described[key] != value
    ]
    if "select_layer" in described and "select_layer" in written and not differences:
        layers, chosen = described["layers"], (written["select_layer"], described["select_layer"])
        if kept_layers(layers, chosen[0]) != kept_layers(layers, chosen[1]):  # -1 is the same as `layers`
            differences.append(Difference("select_layer", *chosen))
    if differences:
        raise DescriptionError(str(path), differences)
    if path and not described and (lacking := [key for key in NOT_IN_SHAPES if key not in written]):
        raise ConfigError(
            f"{path} does not say what its weights are of (no config.json that is known here), and shapes do"
            f" not show {' and '.join(lacking)}: write {', '.join(f'{key}=...' for key in lacking)}; L/16 has"
            " 16 heads, B/16 12; Janus runs gelu, Google's releases gelu_pytorch_tanh"
        )
    return Tower(**{**described, **written})


def described_tower(path: Path) -> dict[str, Any]:
    """Read the config.json in a folder, or beside a file, as a tower's numbers; {} where it describes none.

    Raises:
        CheckpointError: a folder describes a tower of another architecture, or quantised weights.
    """
    folder = describing_folder(path)
    if not (folder / "config.json").is_file():
        return {}
    try:
        return read_description(folder)
    except (CheckpointError, KeyError, TypeError) as error:
        if path.is_file():
            return {}  # what lies beside a file may belong to another
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'config.json'} lacks {error}. Fetch it again.") from error


def read_description(path: Path) -> dict[str, Any]:
    """Read a folder's config.json as a tower's numbers; {} where it does not describe one.

    Raises:
        CheckpointError: it describes a tower of another architecture, or quantised weights.
    """
    refuse_quantized(path)
    record = read_json(path / "config.json")
    if record.get("model_type") == "multi_modality":
        tower = read_tower(record["vision_config"]["cls"], record["vision_config"]["params"])
        return {key: tower.get(key, value) for key, value in asdict(Tower()).items()}
    if record.get("model_type") == "janus-modular":
        encoder = record["model"]["understanding"]["encoder"]
        return (
            {key: encoder.get(key, value) for key, value in asdict(Tower()).items()}
            if encoder["name"] == "siglip"
            else {}
        )
    if "model_type" not in record:  # timm's
        return {}
    whole = read_config(path, "a model of images")
    vision = getattr(whole, "vision_config", whole)
    kind = vision.model_type
    odd = [key for key, usual in USUAL.items() if getattr(vision, key, usual) != usual]
    odd += ["hidden_act"] if getattr(vision, "hidden_act", "gelu") not in ACTIVATIONS else []
    if kind not in FAMILIES or odd:
        found = f"a '{kind}'" if kind not in FAMILIES else f"{', '.join(odd)} of its own"
        raise CheckpointError(
            f"siglip: {path} describes {found}; expected SigLIP's vision tower. hf-vision reads other"
            " vision transformers"
        )
    ratio = getattr(vision, "mlp_ratio", None)  # transformers' Janus has it in the place of intermediate_size
    return {
        "feature_dim": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "intermediate": int(vision.hidden_size * ratio) if ratio else vision.intermediate_size,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "activation": vision.hidden_act,
        "layer_norm_eps": vision.layer_norm_eps,
    }


def described_pixels(folder: Path) -> dict[str, Any]:
    """Read PixelSpec's fields from a folder: a whole Janus' own, in each of its formats, or a processor's.

    Raises:
        CheckpointError: a file is damaged.
    """
    record = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    family = record.get("model_type")
    if family == "multi_modality" and (folder / "preprocessor_config.json").is_file():
        spec = read_pixels(read_json(folder / "preprocessor_config.json"), record["vision_config"]["params"])
    elif family == "janus" and processor_settings(folder):
        spec = read_pixels(read_preprocessor(folder), {})
    elif family == "janus-modular":
        spec = record["model"]["understanding"]["encoder"].get("pixels") or {}
    else:
        spec = processor_settings(folder)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}


FAMILIES = (
    "siglip_vision_model", "janus_vision_model", "idefics2_vision", "idefics3_vision", "smolvlm_vision",
)  # fmt: skip
"""What transformers calls SigLIP's tower, alone and inside larger models."""

USUAL = {"use_qk_norm": False, "attention_bias": True, "num_channels": 3}
"""What a tower of Janus may have otherwise, and this class has not."""


def kept_layers(layers: int, select_layer: int) -> int:
    """Count the blocks up to ``select_layer``: -1 all, -2 all but one, n the first n (the published rule)."""
    kept = min(layers, select_layer if select_layer > 0 else layers + select_layer + 1)
    if kept < 1:
        raise ConfigError(f"siglip: select_layer {select_layer} leaves no block; the least is -{layers}")
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
