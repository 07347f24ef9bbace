"""The understanding encoder `hf-vision`: vision models of transformers (SigLIP2, CLIP, DINOv2, DINOv3 ...).

encoder: {name: hf-vision, pretrained: facebook/dinov2-small}              # config and weights from a folder
encoder: {name: hf-vision, config: {model_type: dinov2, hidden_size: 96}}  # or random weights
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from janus_modular import (
    CheckpointError,
    ComponentConfig,
    ConfigError,
    LoadedWeights,
    PixelSpec,
    Registry,
    UnderstandingEncoder,
    hookimpl,
    resolve_pretrained,
)
from janus_plugins.hf_config_keys import check_keys, check_values, naming_settings
from janus_plugins.hf_folders import (
    check_described,
    read_config,
    refuse_integers,
    refuse_misshapen,
    refuse_unused,
    unused_weights,
    with_overrides,
)
from janus_plugins.hf_pixels import check_pixels, pair, processor_settings
from janus_plugins.hf_rope_keys import refuse_overruled

log = logging.getLogger(__name__)

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALVES = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
FAMILIES: dict[str, dict[str, Any]] = {  # how each family's own processor treats images, by model_type
    "clip_vision_model": {"resize": "crop", **CLIP},
    "siglip_vision_model": {"resize": "stretch", **HALVES},
    "siglip2_vision_model": {"resize": "stretch", **HALVES},  # NaFlex's processor file says native
    "dinov2": {"resize": "crop", **IMAGENET},
    "dinov2_with_registers": {"resize": "crop", **IMAGENET},
    "dinov3_vit": {"resize": "stretch", **IMAGENET},
    "vit": {"resize": "stretch", **HALVES},
    "deit": {"resize": "crop", **IMAGENET},
    "beit": {"resize": "crop", **HALVES},
    "aimv2_vision_model": {"resize": "crop", **CLIP},
    "ijepa": {"resize": "stretch", **HALVES},  # its processor's; its training had ImageNet's numbers
}
# Names in files of two towers; transformers maps those of the other families itself.
KEY_MAPPINGS = {"aimv2_vision_model": {r"^vision_model\.": ""}}
SPECIAL_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")


@dataclass
class HfVisionConfig(ComponentConfig):
    """A vision transformer, described by a transformers config or by the config beside its weights.

    With ``pretrained``, the model is built by the folder's config.json; every key of ``config`` must have the
    same value there, and mean and std of ``pixels`` those of its preprocessor_config.json.
    """

    config: dict[str, Any] | None = None  # transformers' own keys; None: as `pretrained` describes itself
    config_overrides: dict[str, Any] = field(default_factory=dict)  # keys to differ from `pretrained`'s own
    layer: int = -1  # -1: the model's own output; -2: after the last block but one; 1: after the first
    pixels: PixelSpec | None = None  # None: as preprocessor_config.json says, else as its family does


class HfVisionEncoder(nn.Module):
    """Patch tokens of a transformers vision model; class and register tokens are cut off.

    ``layer: -1`` is ``last_hidden_state``, with a final norm where the model applies one to it (SigLIP
    and DINO do, CLIP does not); any other layer is ``hidden_states[layer]``, as its block left it.
    """

    def __init__(self, config: HfVisionConfig) -> None:
        super().__init__()
        folder = resolve_pretrained(config.pretrained, config.revision) if config.pretrained else None
        family = vision_config(config, folder)
        check_values(family.to_dict(), "hf-vision: config")
        with naming_settings(family, "hf-vision: config"):
            self._options = without_pooling(family)
            self.model = AutoModel.from_config(
                copy.deepcopy(family), dtype=torch.get_default_dtype(), **self._options
            )
        self._resize_positions()
        self.feature_dim: int = family.hidden_size
        self.patch = pair(family.patch_size)
        self.pixels = config.pixels or own_pixels(family, folder)
        spec = processor_settings(folder)
        check_pixels(self.pixels, spec, folder)
        if folder and not spec:
            warn_of_normalization(self.pixels, family.model_type, folder)
        named = self.model.named_parameters()
        sizes = {name.rsplit(".", 1)[-1]: weight.numel() for name, weight in named if "embeddings." in name}
        self.special_tokens: int = sum(sizes.get(name, 0) for name in SPECIAL_TOKENS) // self.feature_dim
        self.resizes = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        if not -family.num_hidden_layers <= config.layer <= family.num_hidden_layers:
            raise ConfigError(
                f"hf-vision: layer {config.layer} of a model of {family.num_hidden_layers} blocks"
            )
        keys = {**family.to_diff_dict(), "model_type": family.model_type}
        self.config = replace(
            config, pretrained=None, revision=None, config=keys, config_overrides={}, pixels=self.pixels
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """A feature for each whole patch."""
        return height // self.patch[0], width // self.patch[1]

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C).

        Raises:
            ValueError: tokens, less class and register tokens, are not one for each patch.
        """
        grid = self.grid(*pixels.shape[-2:])
        last = self.config.layer == -1
        inputs = self._inputs(pixels.to(next(self.model.parameters()).dtype))
        inputs["output_hidden_states"] = not last
        fitted = self._positions(*grid)
        output = functional_call(self.model, fitted, (), inputs) if fitted else self.model(**inputs)
        tokens = output.last_hidden_state if last else output.hidden_states[self.config.layer]
        patches = math.prod(grid)
        if tokens.shape[1:-1] != (self.special_tokens + patches,):
            raise ValueError(
                f"hf-vision: '{self.model.config.model_type}' gave {tuple(tokens.shape[1:-1])} tokens, not "
                f"{self.special_tokens} class or register tokens and {patches} patches: it is no plain "
                "vision transformer, and needs a component of its own"
            )
        return tokens[:, self.special_tokens :]

    def load_pretrained(self, path: Path) -> LoadedWeights:
        """Load a folder of weights by transformers' own rules."""
        check_folder(path)
        refuse_integers(path)
        self.model, info = type(self.model).from_pretrained(
            path,
            config=self.model.config,
            dtype=torch.get_default_dtype(),
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            local_files_only=True,
            key_mapping=KEY_MAPPINGS.get(self.model.config.model_type),
            **self._options,
        )
        self._resize_positions()
        refuse_misshapen(path, info["mismatched_keys"])
        tensors = {id(tensor) for tensor in self.model.state_dict(keep_vars=True).values()}  # tied ones once
        missing = sorted(info["missing_keys"])
        inside, unexpected_keys = unused_weights(info["unexpected_keys"], self.model)
        refuse_unused(path, inside, f"the understanding encoder 'hf-vision' ({self.model.config.model_type})")
        return LoadedWeights(len(tensors) - len(missing), missing, unexpected_keys)

    def _resize_positions(self) -> None:
        """Let SigLIP2's NaFlex form resize its position table by `resized_positions`."""
        if self.model.config.model_type == "siglip2_vision_model":
            self.model.embeddings.resize_positional_embeddings = resized_positions

    def _inputs(self, pixels: Tensor) -> dict[str, Any]:
        """Return the model's inputs; SigLIP2's NaFlex form takes patches, channels last, and their grid."""
        if self.model.config.model_type != "siglip2_vision_model":
            return {"pixel_values": pixels, **({"interpolate_pos_encoding": True} if self.resizes else {})}
        rows, columns = self.grid(*pixels.shape[-2:])
        whole = pixels[..., : rows * self.patch[0], : columns * self.patch[1]]
        patches = F.unfold(whole, self.patch, stride=self.patch)  # (N, 3 * p * p, P), channels first
        patches = patches.unflatten(1, (3, -1)).permute(0, 3, 2, 1).flatten(2)  # (N, P, p * p * 3)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": None,  # no patch is padding
            "spatial_shapes": (rows, columns),  # for `resized_positions`, the same for all images
        }

    def _positions(self, rows: int, columns: int) -> dict[str, Tensor]:
        """Return AIMv2's position table for a grid; {} for families that resize theirs themselves.

        It is interpolated (bicubic) like theirs: transformers rejects another number of patches, and misreads
        the table if only the shape of the grid differs.
        """
        family = self.model.config
        if family.model_type != "aimv2_vision_model" or family.is_native:  # native: sines, of any grid
            return {}
        table = self.model.embeddings.position_embedding.weight  # (side * side, C)
        side = math.isqrt(len(table))
        if (rows, columns) == (side, side):
            return {}
        square = table.T.reshape(1, -1, side, side).float()
        fitted = F.interpolate(square, (rows, columns), mode="bicubic", align_corners=False)
        return {
            "embeddings.position_embedding.weight": fitted.flatten(2)[0].T.to(table.dtype),
            "embeddings.position_ids": torch.arange(rows * columns, device=table.device)[None],
        }


def resized_positions(table: Tensor, grid: tuple[int, int] | Tensor, max_length: int) -> Tensor:
    """Return the positions (1, P, C) of a grid, from a table (H, W, C): antialiased bilinear, as SigLIP 2's.

    Two products with weights take the place of torch's and ONNX Runtime's resize, which compute something
    else for a grid of one column on a CPU. Grids (N, 2), with which only others call the model, are
    transformers' own matter.
    """
    if isinstance(grid, Tensor):
        resized: Tensor = Siglip2VisionEmbeddings.resize_positional_embeddings(table, grid, max_length)
        return resized
    by_rows = torch.einsum("rh,hwc->rwc", resize_weights(table.shape[0], grid[0], table), table.float())
    fitted = torch.einsum("kw,rwc->rkc", resize_weights(table.shape[1], grid[1], table), by_rows)
    return fitted.reshape(1, max_length, table.shape[2]).to(table.dtype)


def resize_weights(size: int, output_size: int, like: Tensor) -> Tensor:
    """Return the weights (output_size, size) of a triangle as wide as an output element, or as an input.

    As torch and Pillow: the centre of output i is (i + 0.5) size / output_size, and its weights sum to 1.
    """
    scale = size / torch.full((), output_size, dtype=torch.float32, device=like.device)
    centres = (torch.arange(output_size, device=like.device) + 0.5) * scale
    inputs = torch.arange(size, device=like.device) + 0.5
    weights = (1 - (centres[:, None] - inputs).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def vision_config(config: HfVisionConfig, folder: Path | None) -> Any:
    """Return the vision model's transformers config: the one beside the weights, or that of ``config``.

    Raises:
        ConfigError: there is no config, it is not of a plain vision transformer, or the two differ.
        CheckpointError: the weights are quantised, or have no config.json.
    """
    if folder is not None:
        check_folder(folder)
    described = folder and read_config(folder, "a vision model")
    if config.config:
        keys = copy.deepcopy(dict(config.config))
        if "model_type" not in keys and described is None:
            raise ConfigError("hf-vision: config has no model_type: write transformers' name, such as dinov2")
        keys.setdefault("model_type", described and described.model_type)
        check_keys(keys, "hf-vision: config", FAMILIES, described and vision_part(described))
        if described is not None and folder is not None:
            check_described(config.config, [described, vision_part(described)], folder)
    elif described is None:
        raise ConfigError("hf-vision: give config (transformers' keys) or pretrained (a folder or a hub id)")
    if config.config_overrides and described is None:
        raise ConfigError("hf-vision: config_overrides change what pretrained describes; here, write config")
    family = vision_part(described or AutoConfig.for_model(**keys))
    if described is None:
        refuse_overruled(config.config or {}, family, "hf-vision: config")
    missing = [key for key in ("hidden_size", "patch_size", "num_hidden_layers") if not hasattr(family, key)]
    staged = [key for key in ("depths", "hidden_sizes") if hasattr(family, key)]
    if missing or staged:
        why = f"its {' and '.join(staged)} make stages" if staged else f"it has no {', '.join(missing)}"
        raise ConfigError(
            f"hf-vision: '{family.model_type}' is no plain vision transformer, of one grid of patches: {why}."
            " Choose a family that is, such as siglip2, dinov2 or dinov3_vit, or write a component for it"
        )
    return with_overrides(family, config.config_overrides, "hf-vision: config_overrides")


def vision_part(family: Any) -> Any:
    """Return the vision tower's config in a two-tower model's config; a vision model's own unchanged."""
    return getattr(family, "vision_config", family)


def check_folder(path: Path) -> None:
    """Check that weights are in a folder, with their config.json."""
    if not path.is_dir():
        raise CheckpointError(f"hf-vision reads a folder with config.json and weights; {path} is none")


def without_pooling(family: Any) -> dict[str, Any]:
    """Remove the unused pooling head from a config; return the options of the model that remove it."""
    for head in {"vision_use_head", "use_head"} & vars(family).keys():
        setattr(family, head, False)
    with torch.device("meta"):
        accepts = inspect.signature(type(AutoModel.from_config(copy.deepcopy(family))).__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in accepts else {}


def warn_of_normalization(pixels: PixelSpec, family: str, folder: Path) -> None:
    """Warn of a mean and std that are unusual for the family, if no file of the folder has them."""
    usual = FAMILIES.get(family, {})
    if any(getattr(pixels, key) != usual[key] for key in ("mean", "std") if key in usual):
        log.warning(
            "hf-vision: pixels.mean is %s and pixels.std %s; %s has no preprocessor_config.json that says so,"
            " and '%s' usually has %s and %s. Write those, or leave pixels out, unless these are meant.",
            pixels.mean,
            pixels.std,
            folder,
            family,
            usual["mean"],
            usual["std"],
        )


def own_pixels(family: Any, folder: Path | None) -> PixelSpec:
    """Return how images are preprocessed: by the processor's file, else as usual for the family.

    A "crop" resizes the short side to the size of the crop; processors with a margin around the crop
    (DINOv2: 256, cropped to 224) use a little less of the image.
    """
    spec = processor_settings(folder)
    if family.model_type not in FAMILIES and not spec:
        raise ConfigError(
            f"hf-vision: the preprocessing of '{family.model_type}' is not known and there is no "
            "preprocessor_config.json: give pixels (height, width, resize, mean, std)"
        )
    side = getattr(family, "image_size", None)
    if side is None:  # NaFlex: as many patches as its position table has
        side = int(family.num_patches**0.5) * pair(family.patch_size)[0]
    height, width = pair(side)
    return PixelSpec(**{"height": height, "width": width, **FAMILIES.get(family.model_type, {}), **spec})


@hookimpl
def register_understanding_encoders(registry: Registry[UnderstandingEncoder]) -> None:
    """Register this encoder."""
    registry.add("hf-vision", HfVisionEncoder, HfVisionConfig, families=FAMILIES)
