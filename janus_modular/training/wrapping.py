"""Wraps components of the model that a run starts from: adapters around a trained encoder, for example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.config import component_specs, module_path, resolve, to_plain
from janus_modular.config.errors import FieldError, config_error
from janus_modular.errors import ConfigError
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.suggest import did_you_mean


def wrap_components(
    assembly: ModelAssembly, wraps: Mapping[str, Mapping[str, Any]], plugins: Plugins
) -> None:
    """Wrap components of the model, in place: ``{understanding.encoder: {name: lora, rank: 16}}``.

    The weights of the wrapped components are kept, and the model's config is the same as if the model had
    been built with the wrappers. On the meta device no weights are read.

    Raises:
        ConfigError: the model has no such component; or a wrapper wraps no other component of its slot, is
            around this one already, or rejects its options.
        CheckpointError: a wrapper's own ``pretrained`` weights do not fit.
    """
    model = assembly.model
    specs = {module_path(path): spec for path, spec in component_specs(model.config)}
    frozen = [f"generation.{name}" for name in model.generation.frozen_submodules]
    known = [path for path in specs if path not in frozen]
    for path in wraps:
        if path not in known:
            is_frozen = ", which no stage trains" if path in frozen else ", which is no component"
            raise ConfigError(
                f"wrap: found '{path}'{is_frozen}; expected {', '.join(known)}."
                f" {did_you_mean(path, known)}".rstrip()
            )
    configs = {path: _wrapper_config(path, wrap, specs[path], plugins) for path, wrap in wraps.items()}
    recorder = _NeighbourRecorder(plugins)
    recorder.model(model.config)
    device = next(model.parameters()).device
    for path, (config, inner) in configs.items():
        spec = specs[path]
        wrapper = ComponentSpec(spec.slot, wraps[path]["name"], config, path=f"wrap.{path}")
        build = _WrappingBuilder(
            plugins, getattr(config, inner), model.get_submodule(path), on_meta=device.type == "meta"
        )
        with torch.device(device):
            module = build(wrapper, *recorder.neighbours[id(spec)])
        model.set_submodule(path, module)
        spec.name, spec.config = wrapper.name, wrapper.config
        assembly.provenance.pretrained += build.reports


def _wrapper_config(
    path: str, wrap: Mapping[str, Any], wrapped: ComponentSpec, plugins: Plugins
) -> tuple[Any, str]:
    """Return a wrapper's config around the component ``wrapped``, and the name of the field that holds it."""
    name, slot = wrap["name"], wrapped.slot
    schema = plugins.entry(slot, name).config
    inner = [
        field.name
        for field in fields(schema)
        if field.metadata.get("slot") == slot and field.type in ("ComponentSpec", ComponentSpec)
    ]
    if len(inner) != 1 or inner[0] in wrap:
        problem = f"sets '{inner[0]}' itself" if len(inner) == 1 else "wraps no other component"
        raise ConfigError(
            f"wrap.{path}: '{name}' {problem}; expected a component that wraps another, which init provides:"
            f" wrap={{{path}: {{name: lora, rank: 16}}}}"
        )
    if wrapped.name == name:
        raise ConfigError(f"wrap.{path}: it is '{name}' already. Leave wrap out to continue")
    options = {key: value for key, value in wrap.items() if key != "name"}
    try:
        return resolve({**options, inner[0]: to_plain(wrapped)}, schema, plugins), inner[0]
    except ConfigError as error:
        errors = [
            replace(field_error, path=f"wrap.{path}.{field_error.path}")
            for field_error in error.errors
            if isinstance(field_error, FieldError)
        ]
        raise config_error(errors) if errors else error from error


class _NeighbourRecorder(ModelBuilder):
    """Builds a model on the meta device, and keeps the neighbours that each component was built with."""

    def __init__(self, plugins: Plugins) -> None:
        super().__init__(plugins, on_meta=True)
        self.neighbours: dict[int, tuple[Any, ...]] = {}  # by the id of the spec

    def __call__(self, spec: ComponentSpec, *neighbours: Any) -> Any:
        self.neighbours[id(spec)] = neighbours
        return super().__call__(spec, *neighbours)


class _WrappingBuilder(ModelBuilder):
    """Builds a component around a module that exists already, which stands for the spec ``inner``."""

    def __init__(self, plugins: Plugins, inner: ComponentSpec, module: Any, *, on_meta: bool) -> None:
        super().__init__(plugins, on_meta=on_meta)
        self.inner, self.module = inner, module

    def __call__(self, spec: ComponentSpec, *neighbours: Any) -> Any:
        return self.module if spec is self.inner else super().__call__(spec, *neighbours)
