"""Builds a model from its configuration: each component after those whose sizes it depends on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from janus_modular.capabilities import AttendsTogether, DeclaresPositions
from janus_modular.components import Builder, build_error
from janus_modular.config.errors import FieldError, config_error
from janus_modular.config.schema import ModelConfig
from janus_modular.config.size_limits import check_numbers
from janus_modular.errors import ConfigError, reporting_missing_packages
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.interface_errors import interface_errors
from janus_modular.model.model import JanusModel
from janus_modular.model.understanding import Understanding
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.registry import Entry
from janus_modular.weights.loading import parameters_on_meta
from janus_modular.weights.pretrained import PretrainedReport, load_pretrained

MAX_TENSORS = 200_000
"""Most weights of a model where no checkpoint says how many; the largest have some tens of thousands."""


class ModelBuilder(Builder):
    """Builds components of any slot; those of a model are checked, and load their ``pretrained`` weights."""

    def __init__(self, plugins: Plugins, *, on_meta: bool = False) -> None:
        """Build on the current default device; ``on_meta``: on the meta device, where no weights are read."""
        super().__init__(plugins)
        self.on_meta = on_meta
        self.reports: list[PretrainedReport] = []  # one for each component that loaded weights

    def model(self, config: ModelConfig, *, max_tensors: int = MAX_TENSORS) -> JanusModel:
        """Build the model of a resolved configuration, in float32.

        On the meta device buffers are real, so that those which no checkpoint holds are right.

        Raises:
            ConfigError: a component cannot be built, or has more weights than ``max_tensors`` or memory.
        """
        check_numbers(config, config_path(config))
        with parameters_on_meta() if self.on_meta else nullcontext(), bounded_weights(max_tensors):
            backbone = self(config.backbone)
            encoder = self(config.understanding.encoder)
            adaptor = self(config.understanding.adaptor, encoder.feature_dim, backbone.hidden_size)
            generation = self(config.generation, backbone.hidden_size)
        try:
            understanding = Understanding(encoder, adaptor)
            if isinstance(backbone, DeclaresPositions) and understanding.grid is None:
                raise ValueError(
                    f"the adaptor '{config.understanding.adaptor.name}' makes {understanding.num_tokens}"
                    " positions of an image, and declares no output_grid; expected rows and columns, which"
                    f" the position ids of the backbone '{config.backbone.name}' need: choose another adaptor"
                )
        except ValueError as error:
            raise config_error([FieldError(config_path(config, "understanding"), str(error), "")]) from error
        if config.together and (reason := _refuse_together(backbone)):
            problem = f"the backbone '{config.backbone.name}' does not support bidirectional blocks: {reason}"
            raise config_error([FieldError(config_path(config, "together"), problem, "")])
        return JanusModel(understanding, generation, backbone, config)

    def _complete(self, module: Any, spec: ComponentSpec, entry: Entry[Any]) -> None:
        if reason := interface_errors(module, spec.slot):
            raise build_error(spec, entry, reason)
        if spec.config.pretrained is not None and not self.on_meta:
            with reporting_missing_packages(str(entry)):
                self.reports.append(load_pretrained(module, spec))


def _refuse_together(backbone: Any) -> str:
    if isinstance(backbone, AttendsTogether):
        return backbone.refuse_together()
    return "it is causal (it declares no refuse_together). Leave `together` out, or choose another backbone"


def build_model(
    config: ModelConfig,
    plugins: Plugins | None = None,
    *,
    on_meta: bool = False,
    max_tensors: int = MAX_TENSORS,
) -> JanusModel:
    """Build a model as `ModelBuilder.model` does, without a record of where its weights come from."""
    builder = ModelBuilder(plugins or default_plugins(), on_meta=on_meta)
    return builder.model(config, max_tensors=max_tensors)


def config_path(config: ModelConfig, key: str = "") -> str:
    """Return the path of a key in the user's config, where the model may stand under ``model``."""
    return f"{config.backbone.path.removesuffix('backbone')}{key}".rstrip(".")


@contextmanager
def bounded_weights(max_tensors: int = MAX_TENSORS) -> Iterator[None]:
    """Stop building modules that have more weights than expected, or than fit into the machine's memory.

    Weights on the meta device take no memory, and are only counted.

    Raises:
        ConfigError: a module went beyond a limit; says which limit.
    """
    memory = _physical_memory()
    tensors = size = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, size
        if parameter is None:
            return
        tensors += 1
        if not parameter.is_meta:
            size += parameter.numel() * parameter.element_size()
        if tensors > max_tensors:
            raise ConfigError(f"it has more than {max_tensors:,} weights, the most that are expected")
        if size > memory:
            raise ConfigError(
                f"its weights take more than {size / 1e9:,.1f} GB, and this machine has"
                f" {memory / 1e9:,.1f} GB of memory"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _physical_memory() -> float:
    """Return the bytes of this machine's memory; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")
