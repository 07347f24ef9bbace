"""The model and processor that a run starts from: fresh parts, a checkpoint, or where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from janus_modular.checkpoints.from_config import build_processor, check_vocabulary, compose, tokenizer_files
from janus_modular.checkpoints.native import blank
from janus_modular.checkpoints.opening import check_weights, open_checkpoint, open_lazily
from janus_modular.config import component_specs
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError
from janus_modular.foreign import path_exists, printable
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.processing.processor import Processor
from janus_modular.training.schema import TrainConfig
from janus_modular.training.wrapping import wrap_backbone


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


def sketch_model(config: TrainConfig, plugins: Plugins) -> tuple[JanusModel, Callable[[], Processor]]:
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
