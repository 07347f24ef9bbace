"""The model that a run starts from: new components, a checkpoint, or where the run was interrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from janus_modular.checkpoints.assembly import ModelAssembly, record_suppressed
from janus_modular.checkpoints.opening import open_lazily
from janus_modular.config.errors import FieldError, config_error
from janus_modular.errors import CheckpointError, ConfigError, list_briefly
from janus_modular.foreign import path_exists, printable
from janus_modular.model.build import config_path
from janus_modular.model.model import JanusModel
from janus_modular.plugins import Plugins
from janus_modular.samplers import unusable_samplers
from janus_modular.training.parallel import PartLoader, local_tensor, renew_shards
from janus_modular.training.sampler_check import image_sampler_mismatch
from janus_modular.training.schema import TrainConfig
from janus_modular.training.wrapping import wrap_components
from janus_modular.weights.loading import non_finite

log = logging.getLogger(__name__)


def initial_model(
    config: TrainConfig,
    plugins: Plugins,
    device: torch.device | str,
    *,
    checkpoint: Path | None = None,
    shard: Callable[[JanusModel], None] = lambda _: None,
    loader: PartLoader | None = None,
) -> ModelAssembly:
    """Return the model of a run in float32; on the device ``meta`` its weights are checked, and not read.

    Where the ends of images are learned, answers of the model may begin images. ``checkpoint`` has priority
    over ``init``, and ``init`` over ``model``. ``shard`` divides the model over the processes: before the
    weights of a checkpoint are read, so that ``loader`` copies this process's parts alone; a new model, and a
    model whose components are to be wrapped, are whole before.

    Raises:
        ConfigError: the model cannot be built, or names a sampler that cannot be used here.
        CheckpointError: the weights that it starts from do not fit.
    """
    assembly = _initial_model(config, plugins, device, checkpoint, shard, loader or PartLoader())
    if config.learn_image_ends and torch.device(device).type != "meta":
        let_answers_begin_images(assembly)
    return assembly


def let_answers_begin_images(assembly: ModelAssembly) -> None:
    """Take the token that begins an image from those that answers never contain, in processor and config."""
    processor = assembly.processor
    begin = processor.tokenizer.names["begin_image"]
    if begin in processor.suppress_tokens:
        log.info("answers of the model may contain %r now, because learn_image_ends is true", begin)
    processor.suppress_tokens = tuple(token for token in processor.suppress_tokens if token != begin)
    record_suppressed(assembly.model, processor)


def _initial_model(
    config: TrainConfig,
    plugins: Plugins,
    device: torch.device | str,
    checkpoint: Path | None,
    shard: Callable[[JanusModel], None],
    loader: PartLoader,
) -> ModelAssembly:
    on_meta = torch.device(device).type == "meta"
    if start := checkpoint or _start_checkpoint(config):
        wraps = config.wrap if not checkpoint else None  # the components of a checkpoint are wrapped already
        lazy = open_lazily(start, plugins=plugins)
        if on_meta:
            lazy.check_weights()
            assembly: ModelAssembly = lazy
        else:
            if not wraps:
                shard(lazy.model)
            assembly = lazy.load(device=device, dtype=torch.float32, copy=loader)
            renew_shards(assembly.model)
        for error in sampler_errors(assembly.model, plugins):  # training itself needs no sampler
            log.warning("%s: %s", start, error)
        if wraps:
            wrap_components(assembly, wraps, plugins)
            shard(assembly.model)
        return assembly
    if config.model is None:
        raise ConfigError("found neither model nor init; expected one.")
    assembly = ModelAssembly.from_config(config.model, plugins, device=device)
    if errors := sampler_errors(assembly.model, plugins):
        raise config_error(errors)
    if not on_meta:
        for parameter in assembly.model.parameters():
            loader.sample(parameter)
        shard(assembly.model)
    return assembly


def _start_checkpoint(config: TrainConfig) -> str | None:
    """Return ``init``; raise an error where it can be neither a folder nor a hub id (which has one slash)."""
    if config.init and config.init.count("/") != 1 and not path_exists(config.init):
        raise ConfigError(
            f"init: there is no checkpoint '{printable(config.init, most=200)}'. Train the previous stage"
            " first, or set init=FOLDER (or a hub id); init=null model=NAME starts from a model config."
        )
    return config.init


def sampler_errors(model: JanusModel, plugins: Plugins) -> list[FieldError]:
    """Return an error for each sampler of the model that cannot be used here."""
    drawing = "image_sampler" if model.config.image_sampler else "generation"
    paths = {"chat": config_path(model.config, "text_sampler"), "draw": config_path(model.config, drawing)}
    unusable = unusable_samplers(model, plugins)
    if "draw" not in unusable and (mismatch := image_sampler_mismatch(model, plugins)):
        unusable["draw"] = mismatch
    return [FieldError(paths[command], reason, "") for command, reason in unusable.items()]


def check_finite(model: JanusModel, start: str) -> None:
    """Check that all weights are finite, frozen ones too; ``start`` names where they are from.

    NaN in a frozen image tokenizer would make all of its codes, the targets of training, the same.

    Raises:
        CheckpointError: names up to five weights that are not.
    """
    tensors = {name: local_tensor(x) for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    names = non_finite(tensors)
    if names:
        raise CheckpointError(
            f"{start}: found NaN or infinity, expected finite numbers, in {list_briefly(names)}. Start from"
            " another checkpoint, or fetch this one again."
        )
