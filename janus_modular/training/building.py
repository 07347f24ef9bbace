"""The model and processor that a run starts from: fresh parts, a checkpoint, or where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import torch

from janus_modular.checkpoints import native
from janus_modular.compose import compose, processor_for
from janus_modular.errors import ConfigError
from janus_modular.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.processing.processor import Processor
from janus_modular.training.schema import TrainConfig


def build_model(
    config: TrainConfig, plugins: Plugins, device: torch.device, *, checkpoint: Path | None = None
) -> tuple[JanusModel, Processor]:
    """Return the model in float32 on its device, and its processor.

    ``checkpoint`` comes before ``init``, and that before ``model``.
    """
    folder = checkpoint or (Path(config.init) if config.init else None)
    if folder is not None:
        model = native.load(folder, device=device, dtype=torch.float32, plugins=plugins)
        return model, processor_for(model, folder)
    if config.model is None:
        raise ConfigError("found neither model nor init; expected one.")
    model, processor = compose(config.model, plugins)
    return model.to(device), processor
