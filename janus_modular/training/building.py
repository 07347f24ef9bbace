"""The model and processor that a run starts from: fresh parts, a checkpoint, or where it was interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from janus_modular.assemble import assemble
from janus_modular.checkpoints import native
from janus_modular.errors import ConfigError
from janus_modular.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.processing.processor import Drawing, Processor
from janus_modular.training.schema import TrainConfig


def build_model(
    config: TrainConfig, plugins: Plugins, device: torch.device, *, checkpoint: Path | None = None
) -> tuple[JanusModel, Processor]:
    """Return the model in float32 on its device, and its processor.

    ``checkpoint`` comes before ``init``, and that before ``model``. Where the tokenizer has more tokens
    than the backbone (those for pictures, say), the backbone's vocabulary grows.
    """
    folder = checkpoint or (Path(config.init) if config.init else None)
    if folder is not None:
        model = native.load(folder, device=device, dtype=torch.float32, plugins=plugins)
    elif config.model is not None:
        model = assemble(config.model, plugins)
    else:
        raise ConfigError("found neither model nor init; expected one.")
    processor = processor_of(model, folder)
    if processor.tokenizer.vocab_size > model.backbone.vocab_size:
        model.backbone.resize_vocab(processor.tokenizer.vocab_size)
    return model.to(device), processor


def processor_of(model: JanusModel, tokenizer: Path | None = None) -> Processor:
    """Build the processor that fits a model; ``tokenizer`` is the folder of a checkpoint."""
    generation = model.generation
    config = model.config.processor
    return Processor.build(
        replace(config, tokenizer=str(tokenizer)) if tokenizer else config,
        pixels=model.understanding.encoder.pixels,
        picture_tokens=model.understanding.num_tokens,
        drawing=Drawing(generation.height, generation.width, generation.num_tokens),
        context=model.backbone.context,
    )
