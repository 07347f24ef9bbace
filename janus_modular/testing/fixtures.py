"""Builds a registered component with an example input, so that it can be checked by its name alone.

A component gets its options in a shipped model of `TINY`, or else its defaults; components inside it are
those of the first such model that has one, two of them in a list, and none where they may be left out.
Arguments of its neighbours are small numbers: dimensions, codebooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import nn

from janus_modular.config import component_specs, load, override, resolve, to_plain
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, JanusError, PluginError
from janus_modular.foreign import reason
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.registry import slot_label
from janus_modular.testing.examples import NumpySession, SamplingExample, prompt
from janus_modular.testing.objective_checks import objective_example
from janus_modular.testing.running import Make

TINY = ("tiny", "tiny_flow")
"""Shipped models whose components are small."""

DIM, CODEBOOKS, TOKENS, GRID = 64, (40, 24, 12), 7, (4, 6)
SIDES = (16, 32, 64, 128, 256, 384)
"""Sides of example images in pixels; the first that a tokenizer accepts is used."""


def context(plugins: Plugins, slot: str, name: str, overrides: Iterable[str] = ()) -> Make:
    """Build a registered component with an example; return a function that makes new copies of both.

    Raises:
        ConfigError: its options are invalid or incomplete.
        PluginError: the component does not load, lacks attributes of its example, or its slot has no example
            for every component.
    """
    spec = component_spec(plugins, slot, name, overrides)
    build = ModelBuilder(plugins)
    make_example = EXAMPLES.get(slot)
    if make_example is None:
        raise PluginError(
            f"no example fits every {slot_label(slot)}: write a test with files of its own,"
            " see docs/reference/testing.md"
        )
    torch.manual_seed(0)
    try:
        component, example = make_example(spec, build, plugins)
    except JanusError:
        raise
    except Exception as error:  # a plugin may raise anything
        raise PluginError(
            f"the {slot_label(slot)} '{name}' cannot be checked: {reason(error)}."
            " See the interface of its slot: docs/reference/hooks.md"
        ) from error
    if isinstance(component, nn.Module):
        return lambda: (copy.deepcopy(component), copy.deepcopy(example))
    # a source may hold an open file, which cannot be copied
    return lambda: make_example(spec, build, plugins)


def component_spec(plugins: Plugins, slot: str, name: str, overrides: Iterable[str]) -> ComponentSpec:
    """Return a component's spec: its options in a small model or its defaults, with overrides applied."""
    entry = plugins.entry(slot, name)
    defaults = tiny_options(plugins)
    name = plugins.full_name(slot, name)
    options: dict[str, Any] = defaults.get((slot, name), {})
    hints = get_type_hints(entry.config)
    for field in fields(entry.config):
        inner_slot = field.metadata.get("slot")
        is_optional = type(None) in get_args(hints[field.name])
        if inner_slot and field.name not in options and not is_optional:
            key = next((key for key in defaults if key[0] == inner_slot), None)
            if key:
                example = {"name": key[1], **defaults[key]}
                is_list = get_origin(hints[field.name]) is list
                options[field.name] = [example, example] if is_list else example
    subject = f"the config of the {slot_label(slot)} '{name}'"
    config = resolve(override(options, overrides, plugins), entry.config, plugins, subject=subject)
    return ComponentSpec(slot, name, config)


def tiny_options(plugins: Plugins) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the options of every component of the small models, by slot and name; the first model's go."""
    options: dict[tuple[str, str], dict[str, Any]] = {}
    for model in TINY:
        config = resolve(load(model, plugins=plugins), ModelConfig, plugins)
        for _, spec in component_specs(config):
            key = (spec.slot, plugins.full_name(spec.slot, spec.name))
            options.setdefault(key, to_plain(spec.config))
    return options


Example = tuple[Any, Any]


def _encoder(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    encoder = build(spec)
    return encoder, torch.rand(2, 3, encoder.pixels.height, encoder.pixels.width) * 2 - 1


def _tokenizer(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    component = build(spec)
    size = component.grid if spec.slot == "image_tokenizers" else component.encoded_shape
    low, high = component.value_range
    for side in SIDES:
        try:
            size(side, side)
        except (ValueError, JanusError):
            continue
        return component, torch.rand(2, 3, side, side) * (high - low) + low
    raise ConfigError(
        f"'{spec.name}' accepts no square image with a side of {' or '.join(map(str, SIDES))} pixels"
    )


def _adaptor(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    try:
        return build(spec, DIM // 2, DIM), torch.rand(2, *GRID, DIM // 2)
    except JanusError:  # it may require equal dimensions
        return build(spec, DIM, DIM), torch.rand(2, *GRID, DIM)


def _head(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    hidden = torch.rand(2, 3, DIM)
    for codebooks in (CODEBOOKS, CODEBOOKS[:2]):  # the most codes a position that the head accepts
        try:
            return build(spec, DIM, codebooks), hidden
        except (ValueError, JanusError):
            continue
    return build(spec, DIM, CODEBOOKS[:1]), hidden


def _backbone(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    backbone = build(spec)
    return backbone, torch.randint(backbone.vocab_size, (2, TOKENS))


def _generation(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    path = build(spec, DIM)
    return path, torch.randint(256, (2, 3, path.height, path.width), dtype=torch.uint8)


def _sampler(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    prompts = [prompt(1, 2, 3), prompt(4, 5)]
    return plugins.entry(spec.slot, spec.name).factory, SamplingExample(spec.config, prompts, NumpySession)


def _source(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    source = build(spec)
    return source, sorted({0, len(source) // 2})


def _tracker(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    def open_tracker(folder: Path) -> Any:
        return build(spec, folder)

    return open_tracker, {"loss": 0.5, "lr": 1e-3}


def _objective(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    example = objective_example(plugins)
    return build(spec, example.model), example


def _scheduler(spec: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    return build(spec), 8


EXAMPLES: Mapping[str, Callable[[ComponentSpec, ModelBuilder, Plugins], Example]] = {
    "understanding_encoders": _encoder,
    "image_tokenizers": _tokenizer,
    "image_autoencoders": _tokenizer,
    "adaptors": _adaptor,
    "heads": _head,
    "backbones": _backbone,
    "generation": _generation,
    "text_samplers": _sampler,
    "image_samplers": _sampler,
    "sources": _source,
    "objectives": _objective,
    "trackers": _tracker,
    "schedulers": _scheduler,
}
