"""Reads how timm describes a SigLIP tower: config.json's architecture, model_args and pretrained_cfg."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from janus_modular import CheckpointError

HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
"""The attention heads of timm's architectures, by the size in their names (vit_base_patch16_siglip_224)."""

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""timm's names of activations, and transformers'."""

SIZES = {"embed_dim": "feature_dim", "depth": "layers", "num_heads": "heads", "patch_size": "patch_size"}
"""timm's arguments of a model, and the options of `siglip`."""


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
    tower |= {ours: arguments[theirs] for theirs, ours in SIZES.items() if theirs in arguments}
    if "act_layer" in arguments:
        _check("act_layer", arguments["act_layer"], ACTIVATIONS)
        tower["activation"] = ACTIVATIONS[arguments["act_layer"]]
    if arguments.get("norm_layer") is not None:
        _check("norm_layer", arguments["norm_layer"], ("layernorm",))
    return tower


def timm_pixels(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the mean and std of images in a config.json of timm's, as fields of PixelSpec."""
    settings = record.get("pretrained_cfg") or record  # older files have them beside `architecture`
    return {key: settings[key] for key in ("mean", "std") if settings.get(key) is not None}


def _check(key: str, value: object, expected: Mapping[str, str] | tuple[str, ...]) -> None:
    if value not in expected:
        raise CheckpointError(
            f"siglip: model_args.{key} of timm's config.json is {value!r}; expected {' or '.join(expected)}"
        )
