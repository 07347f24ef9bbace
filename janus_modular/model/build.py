"""From a configuration to a model: build the parts, and let neighbours decide each other's widths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from janus_modular.components import Builder
from janus_modular.config import component_specs
from janus_modular.config.errors import FieldError, config_error
from janus_modular.config.schema import ModelConfig
from janus_modular.config.size_limits import check_numbers
from janus_modular.errors import ConfigError, reporting_missing_packages
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.interface_errors import interface_errors
from janus_modular.model.model import JanusModel, Understanding
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.registry import Entry
from janus_modular.weights.pretrained import PretrainedReport, load_pretrained

MAX_TENSORS = 200_000
"""Most weights of a model where no checkpoint says how many; the largest have some tens of thousands."""


class ModelBuilder(Builder):
    """Builds components of any slot; parts of a model are checked, and get the weights that they ask for."""

    def __init__(
        self,
        plugins: Plugins,
        *,
        weights: bool = True,
        paths: Mapping[int, str] | None = None,
        built: Mapping[int, Any] | None = None,
    ) -> None:
        super().__init__(plugins, paths=paths)
        self.weights = weights
        self.built = built or {}  # modules that are there already, by their parts' `id`
        self.reports: list[PretrainedReport] = []

    def __call__(self, part: ComponentSpec, *neighbours: Any) -> Any:
        return self.built[id(part)] if id(part) in self.built else super().__call__(part, *neighbours)

    def _complete(self, module: Any, part: ComponentSpec, entry: Entry[Any]) -> None:
        if lacks := interface_errors(module, part.slot):
            raise self._build_error(part, entry, lacks)
        if self.weights and part.config.pretrained is not None:
            with reporting_missing_packages(str(entry)):
                self.reports.append(load_pretrained(module, part))


def build_model(
    config: ModelConfig,
    plugins: Plugins | None = None,
    *,
    weights: bool = True,
    root: str = "",
    most_tensors: int = MAX_TENSORS,
) -> JanusModel:
    """Build the model of a resolved configuration, in float32 on the current default device.

    ``weights=False`` leaves every ``pretrained`` unread (its architecture is taken all the same), for
    a checkpoint that is loaded next, or for counting parameters under ``torch.device("meta")``.
    ``root`` is where the model stands in the user's config (``model`` in that of a training), for errors.
    What was loaded from where is in ``model.pretrained``. Building stops at ``most_tensors`` weights.

    Raises:
        ConfigError: a part cannot be built, or is larger than any model, this machine or ``most_tensors``.
    """
    check_numbers(config, root)
    paths = {id(part): f"{root}.{path}".lstrip(".") for path, part in component_specs(config)}
    build = ModelBuilder(plugins or default_plugins(), weights=weights, paths=paths)
    with bounded_weights(most_tensors):
        backbone = build(config.backbone)
        encoder = build(config.understanding.encoder)
        adaptor = build(config.understanding.adaptor, encoder.feature_dim, backbone.hidden_size)
        generation = build(config.generation, backbone.hidden_size)
    try:
        understanding = Understanding(encoder, adaptor)
    except ValueError as error:
        raise config_error([FieldError("understanding", str(error), "")]) from error
    return JanusModel(understanding, generation, backbone, config, build.reports)


@contextmanager
def bounded_weights(most_tensors: int = MAX_TENSORS) -> Iterator[None]:
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
        if tensors > most_tensors:
            raise ConfigError(f"it has more than {most_tensors:,} weights, the most that are expected")
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
