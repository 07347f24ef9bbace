"""The understanding encoder `siglip`, as in Janus and Janus-Pro: a feature for each patch of the image.

The sizes of published models (feature_dim, layers, heads, intermediate, patch_size, image_size):
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
    read_json,
    refuse_quantized,
    resolve_pretrained,
)
from janus_plugins.formats.preparation import read_pixels
from janus_plugins.formats.published_config import read_tower
from janus_plugins.formats.transformers_processor import read_preprocessor
from janus_plugins.hf_folders import describing_folder, read_config
from janus_plugins.hf_pixels import check_pixels, processor_settings
from janus_plugins.sizes import check_heads, check_sizes
from janus_plugins.understanding_encoders.timm_config import timm_pixels, timm_tower


@dataclass(frozen=True)
class Tower:
    """The sizes of a SigLIP tower. The defaults are the published L/16-384, as in Janus."""

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
"""Options that shapes of weights do not show: a wrong value would go unnoticed."""


Activation = Literal["gelu", "gelu_pytorch_tanh"]
ACTIVATIONS = get_args(Activation)


@dataclass
class SiglipConfig(ComponentConfig):
    """The sizes of a tower. None: as the config.json of ``pretrained`` has it, else that of L/16-384.

    Values must be equal to those in the config.json of the folder, or beside the file, except for
    ``image_size``: positions are interpolated. Without a config.json, ``heads`` and ``activation`` are
    required.
    """

    feature_dim: int | None = None  # C; L/16-384: 1024
    layers: int | None = None  # transformer blocks; 24
    heads: int | None = None  # of attention; 16
    intermediate: int | None = None  # hidden dimension of each MLP; 4096
    patch_size: int | None = None  # pixels; 16
    image_size: int | None = None  # side of the images of the position table, in pixels; 384
    activation: Activation | None = None  # gelu; Google's releases: the tanh one
    layer_norm_eps: float | None = None  # 1e-6
    select_layer: int | None = (
        None  # the last block that is run: -1 the last, -2 the one before it, 2 the second
    )
    pixels: PixelSpec | None = None  # of any size; None: as the folder's files have it, else image_size

    def __post_init__(self) -> None:
        """Check the sizes."""
        least = ("feature_dim", "layers", "heads", "intermediate", "patch_size", "image_size")
        check_sizes(self, **{name: 1 for name in least if getattr(self, name) is not None})
        if self.feature_dim and self.heads:
            check_heads(self.feature_dim, self.heads)


class SiglipEncoder(nn.Module):
    """transformers' SigLIP vision tower without its pooling head, cut after ``select_layer``.

    Features are the patch tokens of the last block that is built, after the final LayerNorm.
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
        """Return the rows and columns of whole patches; remainders at the edges are ignored."""
        return height // self.tower.patch_size, width // self.tower.patch_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        native = (self.tower.image_size, self.tower.image_size)
        interpolates = self.pixels.multiple is not None or tuple(pixels.shape[-2:]) != native
        output = self.model(pixels, interpolate_pos_encoding=interpolates)
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
            f"{sorted(weights)[:5]}, ...; pass a SigLIP or a Janus checkpoint"
        )

    def _read(
        self, weights: Mapping[str, Tensor], prefix: str, rename: Renaming
    ) -> Iterator[tuple[str, Tensor]]:
        for name in weights:
            if not name.startswith(prefix):
                continue  # of another component
            inside = name.removeprefix(prefix)
            if inside.startswith(UNUSED):
                _ = weights[name]  # read, so that it is not reported as unexpected
                continue
            own = rename(inside)
            # With a prefix, all weights are the tower's; without one, a file may contain a text tower too.
            if (prefix or belongs_to(own[0], self.model)) and not self._is_unused(own[0]):
                for key, tensor in zip(own, weights[name].chunk(len(own)), strict=True):
                    yield f"model.{key}", self._resize(tensor) if "position_embedding" in key else tensor

    def _is_unused(self, name: str) -> bool:
        """Return True for weights of blocks that ``select_layer`` cuts off, and for position ids."""
        block = re.match(r"encoder\.layers\.(\d+)\.", name)
        cut_off = range(kept_layers(self.tower.layers, self.tower.select_layer), self.tower.layers)
        return name == "embeddings.position_ids" or (block is not None and int(block[1]) in cut_off)

    def _resize(self, table: Tensor) -> Tensor:
        """Interpolate a position table (P, C) to this model's size, as transformers does at run time."""
        table = table.squeeze(0)  # timm's has a batch dimension
        side, new_side = int(len(table) ** 0.5), self.tower.image_size // self.tower.patch_size
        if side == new_side or side**2 != len(table):
            return table  # the loader reports a table that is not square
        grid = table.T.reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
        return grid.flatten(2)[0].T.contiguous()


def chosen_tower(config: SiglipConfig, path: Path | None) -> Tower:
    """Return the tower that the config beside the weights describes, completed by ``config``.

    Raises:
        DescriptionError: a value of ``config`` differs from the one beside the weights.
        ConfigError: neither has an option that shapes do not show.
    """
    written = {key: value for key in asdict(Tower()) if (value := getattr(config, key)) is not None}
    described = described_tower(path) if path else {}
    differences = [
        Difference(key, value, described[key])
        for key, value in written.items()
        if key not in ("image_size", "select_layer") and key in described and described[key] != value
    ]
    if "select_layer" in described and "select_layer" in written and not differences:
        layers, selected = described["layers"], (written["select_layer"], described["select_layer"])
        if kept_layers(layers, selected[0]) != kept_layers(layers, selected[1]):  # -1 is the same as `layers`
            differences.append(Difference("select_layer", *selected))
    if differences:
        raise DescriptionError(str(path), differences)
    if path and (missing := [key for key in NOT_IN_SHAPES if key not in {**described, **written}]):
        raise ConfigError(
            f"{path} has no config.json of a known model that says so, and shapes of weights do"
            f" not show {' and '.join(missing)}: write {', '.join(f'{key}=...' for key in missing)}; L/16 has"
            " 16 heads, B/16 12; Janus runs gelu, Google's releases gelu_pytorch_tanh"
        )
    return Tower(**{**described, **written})


def described_tower(path: Path) -> dict[str, Any]:
    """Return the sizes in the config.json of a folder, or beside a file; {} if there are none.

    Raises:
        CheckpointError: the folder is of another architecture, or its weights are quantised.
    """
    folder = describing_folder(path)
    if not (folder / "config.json").is_file():
        return {}
    try:
        return read_description(folder)
    except (CheckpointError, KeyError, TypeError) as error:
        if path.is_file():
            return {}  # a config.json beside a file may belong to another file
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / 'config.json'} lacks {error}. Fetch it again.") from error


def read_description(path: Path) -> dict[str, Any]:
    """Return the sizes in a folder's config.json; {} if it has none.

    Raises:
        CheckpointError: the folder is of another architecture, or its weights are quantised.
    """
    refuse_quantized(path)
    record = read_json(path / "config.json", CheckpointError)
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
    if "architecture" in record:
        return timm_tower(record)
    if "model_type" not in record:
        if keys := sorted(record.keys() & {"num_attention_heads", "hidden_act"}):
            raise CheckpointError(
                f"siglip: {path / 'config.json'} has {' and '.join(keys)}, but no model_type: write it there"
                " (siglip_vision_model for a vision tower of SigLIP's)"
            )
        return {}
    whole = read_config(path, "a model of images")
    vision = getattr(whole, "vision_config", whole)
    model_type = vision.model_type
    unsupported = [key for key, usual in USUAL.items() if getattr(vision, key, usual) != usual]
    unsupported += ["hidden_act"] if getattr(vision, "hidden_act", "gelu") not in ACTIVATIONS else []
    if model_type not in FAMILIES or unsupported:
        reason = f"a '{model_type}'" if model_type not in FAMILIES else f"other {', '.join(unsupported)}"
        raise CheckpointError(
            f"siglip: {path} describes {reason}; expected SigLIP's vision tower. hf-vision reads other"
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
    """Return PixelSpec's fields from a folder of a Janus checkpoint, in each format, or of a processor.

    Raises:
        CheckpointError: a file is damaged.
    """
    file = folder / "config.json"
    record = read_json(file, CheckpointError) if file.is_file() else {}
    family = record.get("model_type")
    if family == "multi_modality" and (folder / "preprocessor_config.json").is_file():
        spec = read_pixels(
            read_json(folder / "preprocessor_config.json", CheckpointError), record["vision_config"]["params"]
        )
    elif family == "janus" and processor_settings(folder):
        spec = read_pixels(read_preprocessor(folder), {})
    elif family == "janus-modular":
        spec = record["model"]["understanding"]["encoder"].get("pixels") or {}
    elif "architecture" in record and not processor_settings(folder):
        spec = timm_pixels(record)
    else:
        spec = processor_settings(folder)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}


FAMILIES = (
    "siglip_vision_model", "janus_vision_model", "idefics2_vision", "idefics3_vision", "smolvlm_vision",
)  # fmt: skip
"""The model types of SigLIP's tower in transformers, alone and inside larger models."""

USUAL = {"use_qk_norm": False, "attention_bias": True, "num_channels": 3}
"""Config keys of transformers' Janus towers, with the only values that this class supports."""


def kept_layers(layers: int, select_layer: int) -> int:
    """Count the blocks up to ``select_layer``: -1 all, -2 all but one, n the first n (the published rule)."""
    kept = min(layers, select_layer if select_layer > 0 else layers + select_layer + 1)
    if kept < 1:
        raise ConfigError(f"siglip: select_layer {select_layer} leaves no block; the least is -{layers}")
    return kept


def from_timm(name: str) -> list[str]:
    """Return SigLIP's names for a name of timm: three for fused queries, keys and values."""
    for pattern, replacement in TIMM_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return [name.replace(".qkv.", f".{letter}_proj.") for letter in "qkv"] if ".qkv." in name else [name]


def from_transformers(name: str) -> list[str]:
    """Return SigLIP's name for a name of transformers' SigLIP or Janus."""
    return [name.replace(".projection_layer.", ".out_proj.")]


Renaming = Callable[[str], list[str]]
ANCHORS: dict[str, Renaming] = {  # weights by which a tower and the prefix of its names are found
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
    """Register this encoder."""
    registry.add("siglip", SiglipEncoder, SiglipConfig)
