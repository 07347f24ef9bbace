"""The model and processor that a run starts from: fresh parts, a checkpoint, or where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from janus_modular.checkpoints.from_config import build_processor, check_vocabulary, compose, tokenizer_files
from janus_modular.checkpoints.native import blank
from janus_modular.checkpoints.opening import check_weights, open_checkpoint, open_lazily
from janus_modular.config import component_specs, resolve, to_plain
from janus_modular.config.errors import FieldError, config_error
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError
from janus_modular.foreign import path_exists, printable
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.processing.processor import Processor
from janus_modular.training.schema import TrainConfig


def initial_model(
    config: TrainConfig, plugins: Plugins, device: torch.device, *, checkpoint: Path | None = None
) -> tuple[JanusModel, Processor]:
    """Return the model in float32 on its device, and its processor.

    ``checkpoint`` comes before ``init``, and that before ``model``.
    """
    if start := checkpoint or _start(config):
        model, processor = open_checkpoint(start, device=device, dtype=torch.float32, plugins=plugins)
        if config.wrap and not checkpoint:  # which has been put around it already
            wrap_backbone(model, config.wrap, plugins)
        return model, processor
    model, processor = compose(_fresh(config), plugins, root="model")
    return model.to(device), processor


def build_meta_model(config: TrainConfig, plugins: Plugins) -> tuple[JanusModel, Callable[[], Processor]]:
    """Return the model without memory for its parameters, and how to get its processor.

    Apart, because a tokenizer may have to be fetched, and much can be said without it.
    """
    if start := _start(config):
        opened = open_lazily(start, plugins=plugins)
        check_weights(opened)
        if config.wrap:
            wrap_backbone(opened.model, config.wrap, plugins)
        return opened.model, lambda: opened.processor
    fresh = _fresh(config)
    model = blank(fresh, plugins, root="model")

    def processor() -> Processor:
        with tokenizer_files(fresh, root="model") as source:
            made = build_processor(model, source)
        if any(part.config.pretrained for _, part in component_specs(fresh.backbone)):
            check_vocabulary(model, made)
        return made

    return model, processor


def _start(config: TrainConfig) -> str | None:
    """Return ``init``, unless it can be neither a folder nor a hub id (which has one slash)."""
    if config.init and config.init.count("/") != 1 and not path_exists(config.init):
        raise ConfigError(
            f"init: there is no checkpoint '{printable(config.init, most=200)}'. Train the stage before"
            " this one first, or give init=FOLDER (or a hub id); init=null model=NAME starts from nothing."
        )
    return config.init


def _fresh(config: TrainConfig) -> ModelConfig:
    if config.model is None:
        raise ConfigError("found neither model nor init; expected one.")
    return config.model


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
