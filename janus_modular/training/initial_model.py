"""The model that a run starts from: new components, a checkpoint, or where the run was interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.config import resolve, to_plain
from janus_modular.config.errors import FieldError, config_error
from janus_modular.errors import ConfigError
from janus_modular.foreign import path_exists, printable
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.training.schema import TrainConfig

SLOT = "backbones"


def initial_model(
    config: TrainConfig, plugins: Plugins, device: torch.device | str, *, checkpoint: Path | None = None
) -> ModelAssembly:
    """Return the model of a run in float32; on the device ``meta`` its weights are checked, and not read.

    ``checkpoint`` comes before ``init``, and that before ``model``.
    """
    if start := checkpoint or _start(config):
        assembly = ModelAssembly.from_checkpoint(start, device=device, dtype=torch.float32, plugins=plugins)
        if config.wrap and not checkpoint:  # whose backbone is wrapped already
            wrap_backbone(assembly, config.wrap, plugins)
        return assembly
    if config.model is None:
        raise ConfigError("found neither model nor init; expected one.")
    return ModelAssembly.from_config(config.model, plugins, device=device)


def _start(config: TrainConfig) -> str | None:
    """Return ``init``, unless it can be neither a folder nor a hub id (which has one slash)."""
    if config.init and config.init.count("/") != 1 and not path_exists(config.init):
        raise ConfigError(
            f"init: there is no checkpoint '{printable(config.init, most=200)}'. Train the stage before"
            " this one first, or give init=FOLDER (or a hub id); init=null model=NAME starts from nothing."
        )
    return config.init


class _WrappingBuilder(ModelBuilder):
    """Builds a backbone around a module that exists already, which stands for the spec ``inner``."""

    def __init__(self, plugins: Plugins, inner: ComponentSpec, module: Any, *, on_meta: bool) -> None:
        super().__init__(plugins, on_meta=on_meta)
        self.inner, self.module = inner, module

    def __call__(self, spec: ComponentSpec, *neighbours: Any) -> Any:
        return self.module if spec is self.inner else super().__call__(spec, *neighbours)


def wrap_backbone(assembly: ModelAssembly, wrap: Mapping[str, Any], plugins: Plugins) -> None:
    """Put the backbone that ``wrap`` describes (``{name: lora, rank: 16}``) around the model's own, in place.

    The weights inside stay where they are; its config is written as if it had been built so at once. On the
    meta device no weights are read.

    Raises:
        ConfigError: it holds no other, is around the model's backbone already, or refuses its options.
        CheckpointError: weights that it asks for (``pretrained``) do not fit.
    """
    model = assembly.model
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
    spec, device = ComponentSpec(SLOT, name, config, path="wrap"), next(model.parameters()).device
    build = _WrappingBuilder(
        plugins, getattr(config, inside[0]), model.backbone, on_meta=device.type == "meta"
    )
    with torch.device(device):
        model.backbone = build(spec)
    model.config.backbone = replace(spec, path=old.path)
    assembly.provenance.pretrained += build.reports
