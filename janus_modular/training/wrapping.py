"""A backbone that holds another, around the one that a checkpoint has: adapters on a whole trained model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from janus_modular.config import resolve, to_plain
from janus_modular.config.errors import FieldError, config_error
from janus_modular.errors import ConfigError
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins

SLOT = "backbones"


def wrap_backbone(model: JanusModel, wrap: Mapping[str, Any], plugins: Plugins) -> None:
    """Put the backbone that ``wrap`` describes (``{name: lora, rank: 16}``) around the model's own, in place.

    The weights inside stay where they are; its config is written as if it had been built so at once. On the
    meta device no weights are read.

    Raises:
        ConfigError: it holds no other, is around the model's backbone already, or refuses its options.
        CheckpointError: weights that it asks for (``pretrained``) do not fit.
    """
    name, old = wrap["name"], model.config.backbone
    schema = plugins.entry(SLOT, name).config
    inside = [field.name for field in fields(schema) if field.metadata.get("slot") == SLOT]
    if len(inside) != 1 or inside[0] in wrap:
        found = f"gives '{inside[0]}' itself" if len(inside) == 1 else "holds no other backbone"
        raise ConfigError(
            f"wrap: '{name}' {found}; expected one that holds another, and init's is put there:"
            " wrap={name: lora, rank: 16}"
        )
    if old.name == name:
        raise ConfigError(f"wrap: the backbone of init is '{name}' already. Leave wrap out to train on")
    options = {key: value for key, value in wrap.items() if key != "name"}
    try:
        config = resolve({**options, inside[0]: to_plain(old)}, schema, plugins)
    except ConfigError as error:
        errors = [
            replace(one, path=f"wrap.{one.path}") for one in error.errors if isinstance(one, FieldError)
        ]
        raise config_error(errors) if errors else error from error
    part, device = ComponentSpec(SLOT, name, config), next(model.parameters()).device
    build = ModelBuilder(
        plugins,
        weights=device.type != "meta",
        paths={id(part): "wrap"},
        built={id(getattr(config, inside[0])): model.backbone},
    )
    with torch.device(device):
        model.backbone = build(part)
    model.config.backbone = part
    model.pretrained += build.reports
