"""From a configuration to a model: build the parts, and let neighbours decide each other's widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from janus_modular.checkpoints.pretrained import PretrainedReport, load_pretrained
from janus_modular.config import parts_in
from janus_modular.config.faults import Fault, config_error
from janus_modular.errors import ConfigError, JanusError
from janus_modular.fitting import misfit
from janus_modular.interfaces import Part
from janus_modular.model import JanusModel, Understanding
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.registry import Hooks, slot_label
from janus_modular.schema import ModelConfig


class Builder:
    """Builds components by slot and name, and loads the weights that they ask for.

    Handed to components that are made of others: ``build(config.tokenizer)``.
    """

    def __init__(
        self,
        plugins: Plugins,
        *,
        weights: bool = True,
        paths: Mapping[int, str] | None = None,
        built: Mapping[int, Any] | None = None,
    ) -> None:
        self.plugins = plugins
        self.weights = weights
        self.paths = paths or {}  # of parts in the config, by `id`: for errors
        self.built = built or {}  # modules that are there already, by their parts' `id`
        self.reports: list[PretrainedReport] = []

    def __call__(self, part: Part, *neighbours: Any) -> Any:
        """Build one component; ``neighbours`` are what its slot's factory takes beside the config.

        A component whose config holds parts itself gets this builder as its last argument.

        Raises:
            ConfigError: the component refuses its options or its neighbours, or does not fit its slot.
        """
        if id(part) in self.built:
            return self.built[id(part)]
        entry = self.plugins.entry(part.slot, part.name)
        if any("slot" in field.metadata for field in fields(part.config)):
            neighbours = (*neighbours, self)
        try:
            module = entry.factory(part.config, *neighbours)
        except Exception as error:
            if isinstance(error, OSError | MemoryError | torch.OutOfMemoryError):
                raise  # nothing that other options would cure
            if isinstance(error, JanusError) and (not isinstance(error, ConfigError) or error.faults):
                raise
            raise self._refusal(part, entry.plugin, _told(error, part.slot)) from error
        if lacks := misfit(module, part.slot):
            raise self._refusal(part, entry.plugin, lacks)
        if self.weights and part.config.pretrained is not None:
            self.reports.append(load_pretrained(module, part))
        return module

    def _refusal(self, part: Part, plugin: str, reason: str) -> ConfigError:
        found = f"the {slot_label(part.slot)} '{part.name}' of {plugin} cannot be built: {reason}"
        return config_error([Fault(self.paths.get(id(part), part.slot), found, "")])


def _told(error: Exception, slot: str) -> str:
    """Return what an error has to say: options are refused in words, other errors need their type."""
    if isinstance(error, ValueError | ConfigError):
        return str(error)
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, TypeError):
        said += f" (for its author: {getattr(Hooks, f'register_{slot}').__doc__})"
    return said


def assemble(config: ModelConfig, plugins: Plugins | None = None, *, weights: bool = True) -> JanusModel:
    """Build the model of a resolved configuration, in float32 on the current default device.

    ``weights=False`` leaves every ``pretrained`` unread (its architecture is taken all the same), for
    a checkpoint that is loaded next, or for counting parameters under ``torch.device("meta")``.
    What was loaded from where is in ``model.pretrained``.
    """
    paths = {id(part): path for path, part in parts_in(config)}
    build = Builder(plugins or default_plugins(), weights=weights, paths=paths)
    backbone = build(config.backbone)
    encoder = build(config.understanding.encoder)
    adaptor = build(config.understanding.adaptor, encoder.width, backbone.width)
    generation = build(config.generation, backbone.width)
    try:
        understanding = Understanding(encoder, adaptor)
    except ValueError as error:
        raise config_error([Fault("understanding", str(error), "")]) from error
    return JanusModel(understanding, generation, backbone, config, build.reports)
