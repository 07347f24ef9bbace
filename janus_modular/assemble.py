"""From a configuration to a model: build the parts, and let neighbours decide each other's widths."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from janus_modular.checkpoints.pretrained import PretrainedReport, load_pretrained
from janus_modular.errors import ConfigError
from janus_modular.interfaces import Part
from janus_modular.model import JanusModel, Understanding
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.schema import ModelConfig


class Builder:
    """Builds components by slot and name, and loads the weights that they ask for.

    Handed to components that are made of others: ``build(config.tokenizer)``.
    """

    def __init__(self, plugins: Plugins, *, weights: bool = True) -> None:
        self.plugins = plugins
        self.weights = weights
        self.reports: list[PretrainedReport] = []

    def __call__(self, part: Part, *neighbours: Any) -> Any:
        """Build one component; ``neighbours`` are what its slot's factory takes beside the config.

        A component whose config holds parts itself gets this builder as its last argument.
        """
        entry = self.plugins.entry(part.slot, part.name)
        if any("slot" in field.metadata for field in fields(part.config)):
            neighbours = (*neighbours, self)
        try:
            module = entry.factory(part.config, *neighbours)
        except ValueError as error:
            raise ConfigError(f"{part.slot} '{part.name}' cannot be built: {error}") from error
        if self.weights and part.config.pretrained is not None:
            self.reports.append(load_pretrained(module, part))
        return module


def assemble(config: ModelConfig, plugins: Plugins | None = None, *, weights: bool = True) -> JanusModel:
    """Build the model of a resolved configuration, in float32 on the current default device.

    ``weights=False`` leaves every ``pretrained`` unread (its architecture is taken all the same), for
    a checkpoint that is loaded next, or for counting parameters under ``torch.device("meta")``.
    What was loaded from where is in ``model.pretrained``.
    """
    build = Builder(plugins or default_plugins(), weights=weights)
    backbone = build(config.backbone)
    encoder = build(config.understanding.encoder)
    adaptor = build(config.understanding.adaptor, encoder.width, backbone.width)
    generation = build(config.generation, backbone.width)
    return JanusModel(Understanding(encoder, adaptor), generation, backbone, config, build.reports)
