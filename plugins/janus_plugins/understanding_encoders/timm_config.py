"""Reads how timm describes a SigLIP tower: config.json's architecture, model_args and pretrained_cfg."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from janus_modular import CheckpointError

log = logging.getLogger(__name__)

HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
"""The attention heads of timm's architectures, by the size in their names (vit_base_patch16_siglip_224)."""

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""timm's names of activations, and transformers'."""

SIZES = {"embed_dim": "feature_dim", "depth": "layers", "num_heads": "heads", "patch_size": "patch_size"}
"""timm's arguments of a model, and the options of `siglip`."""

OTHERS = {
    "global_pool": ("map", "avg", "token", ""),  # the pooling head is not read
    "class_token": (False,),
    "reg_tokens": (0, None),
    "pos_embed": ("learn",),
    "pre_norm": (False,),
    "final_norm": (True,),
    "fc_norm": (None, True, False),  # after the pooling
    "qkv_bias": (True,),
    "qk_norm": (False,),
    "init_values": (None,),
    "proj_bias": (True,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "in_chans": (3,),
}
"""Other arguments that change what is computed, and their values in a SigLIP tower."""

HARMLESS = {
    "img_size", "num_classes", "mlp_ratio", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad",
    "no_embed_class", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "drop_path_rate", "pool_include_prefix",
}  # fmt: skip
"""Arguments that do not change the patch tokens in eval mode, or that shapes of weights show."""

INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "random")
"""timm's interpolations whose images look like bicubic ones, which are used."""

RESIZES = {"center": "crop", "squash": "stretch", "border": "letterbox"}
"""timm's modes of cropping, and PixelSpec's ways to resize."""


def timm_tower(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `siglip` that a config.json of timm's describes.

    timm's own defaults are not known here: what neither the architecture nor model_args say is left out.

    Raises:
        CheckpointError: a value is of another type, or the tower has an activation or a norm that `siglip`
            does not have.
    """
    arguments = record.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise CheckpointError(
            f"siglip: model_args of timm's config.json is {arguments!r:.60}; expected a mapping"
        )
    for key in SIZES.keys() & arguments.keys():
        if type(arguments[key]) is not int or arguments[key] < 1:
            raise CheckpointError(
                f"siglip: model_args.{key} of timm's config.json is {arguments[key]!r:.60}; expected a whole"
                " number from 1"
            )
    size = re.search(r"vit_([a-z0-9]+)_patch\d+_siglip", str(record.get("architecture")))
    tower: dict[str, Any] = {"heads": HEADS[size[1]]} if size and size[1] in HEADS else {}
    tower |= {option: arguments[timm_key] for timm_key, option in SIZES.items() if timm_key in arguments}
    if "act_layer" in arguments:
        _check("act_layer", arguments["act_layer"], ACTIVATIONS)
        tower["activation"] = ACTIVATIONS[arguments["act_layer"]]
    if arguments.get("norm_layer") is not None:
        _check("norm_layer", arguments["norm_layer"], ("layernorm",))
    for key, values in OTHERS.items():
        if key in arguments:
            _check(key, arguments[key], values)
    if unknown := sorted(
        arguments.keys() - SIZES.keys() - OTHERS.keys() - HARMLESS - {"act_layer", "norm_layer"}
    ):
        raise CheckpointError(
            f"siglip: model_args of timm's config.json has {', '.join(unknown)}, which siglip does not read:"
            f" another tower may be meant. Expected {', '.join(sorted(SIZES))}, act_layer and norm_layer. If"
            " the others do not change the patch tokens, take them out of the file."
        )
    return tower


def timm_pixels(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a config.json of timm's preprocesses images, as fields of PixelSpec.

    Raises:
        CheckpointError: the images are interpolated or cropped in a way that is not supported.
    """
    settings = record.get("pretrained_cfg") or record  # older files have them beside `architecture`
    if not isinstance(settings, Mapping):
        raise CheckpointError(
            f"siglip: pretrained_cfg of timm's config.json is {settings!r:.60}; expected a mapping"
        )
    spec = {key: settings[key] for key in ("mean", "std") if settings.get(key) is not None}
    for key, numbers in spec.items():
        if not isinstance(numbers, list) or not all(type(number) in (int, float) for number in numbers):
            raise CheckpointError(
                f"siglip: pretrained_cfg.{key} of timm's config.json is {numbers!r:.60}; expected three"
                " numbers"
            )
    if settings.get("interpolation") is not None:
        _check("interpolation", settings["interpolation"], INTERPOLATIONS, "pretrained_cfg")
    if settings.get("crop_mode") is not None:
        _check("crop_mode", settings["crop_mode"], RESIZES, "pretrained_cfg")
        spec["resize"] = RESIZES[settings["crop_mode"]]
    share = settings.get("crop_pct")
    if share is not None and type(share) not in (int, float):
        raise CheckpointError(
            f"siglip: pretrained_cfg.crop_pct of timm's config.json is {share!r:.60}; expected a number"
        )
    if share not in (None, 1):
        log.warning(
            "timm's config.json cuts the middle %s of each side (crop_pct) out of images, as for ImageNet;"
            " here the whole image is used",
            share,
        )
    return spec


def _check(
    key: str, value: object, expected: Mapping[str, str] | tuple[object, ...], where: str = "model_args"
) -> None:
    if not any(value is each or (isinstance(each, str | int) and value == each) for each in expected):
        raise CheckpointError(
            f"siglip: {where}.{key} of timm's config.json is {value!r:.60}; expected"
            f" {' or '.join(str(each) or 'an empty text' for each in expected)}"
        )
