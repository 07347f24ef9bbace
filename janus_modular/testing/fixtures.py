"""Small surroundings for a registered component, so that it can be checked by its name alone.

A component gets the options that the shipped model ``tiny`` gives it, or else its defaults; components inside
it that nobody chose are ``tiny``'s too, two where there may be several. Neighbours are numbers: widths, a few
codes, a few tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

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
from janus_modular.testing.running import Make

WIDTH, CODES, TOKENS, GRID = 64, (40, 24, 12), 7, (4, 6)
SIDES = (16, 32, 64, 128, 256, 384)
"""Sides of images, in pixels: the first that a tokenizer takes is used."""


def context(plugins: Plugins, slot: str, name: str, overrides: Iterable[str] = ()) -> Make:
    """Build a registered component with an example; return what makes a fresh copy of both.

    Raises:
        ConfigError: its options are not right, or it needs some that nobody gave.
        PluginError: it does not load, lacks what an example is made from (a length, a size), or its slot has
            no example that fits every component.
    """
    part = chosen(plugins, slot, name, overrides)
    build = ModelBuilder(plugins)
    make_example = EXAMPLES.get(slot)
    if make_example is None:
        raise PluginError(
            f"a {slot_label(slot)} is checked on files of its own, which nobody but its author has: "
            "write a test, see docs/reference/testing.md"
        )
    torch.manual_seed(0)
    try:
        component, example = make_example(part, build, plugins)
    except JanusError:
        raise
    except Exception as error:  # of a plugin: it may raise anything
        raise PluginError(
            f"the {slot_label(slot)} '{name}' cannot be tried: {reason(error)}. What its slot asks for:"
            " docs/reference/hooks.md"
        ) from error
    if isinstance(component, nn.Module):
        return lambda: (copy.deepcopy(component), copy.deepcopy(example))
    # a source may hold what cannot be copied (an open file); nothing in training copies it
    return lambda: make_example(part, build, plugins)


def chosen(plugins: Plugins, slot: str, name: str, overrides: Iterable[str]) -> ComponentSpec:
    """Return the component with its options: ``tiny``'s or its defaults, then the overrides."""
    entry = plugins.entry(slot, name)
    small = tiny(plugins)
    name = plugins.full_name(slot, name)
    options: dict[str, Any] = small.get((slot, name), {})
    hints = get_type_hints(entry.config)
    for field in fields(entry.config):
        inside = field.metadata.get("slot")
        if inside and field.name not in options:
            first = next((one for one in small if one[0] == inside), None)
            if first:
                example = {"name": first[1], **small[first]}
                several = get_origin(hints[field.name]) is list
                options[field.name] = [example, example] if several else example
    return ComponentSpec(slot, name, resolve(override(options, overrides, plugins), entry.config, plugins))


def tiny(plugins: Plugins) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the options of every component of the shipped model ``tiny``, by slot and name."""
    config = resolve(load("tiny", plugins=plugins), ModelConfig, plugins)
    return {
        (part.slot, plugins.full_name(part.slot, part.name)): to_plain(part.config)
        for _, part in component_specs(config)
    }


Example = tuple[Any, Any]


def _encoder(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    encoder = build(part)
    return encoder, torch.rand(2, 3, encoder.pixels.height, encoder.pixels.width) * 2 - 1


def _tokenizer(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    tokenizer = build(part)
    low, high = tokenizer.value_range
    for side in SIDES:
        try:
            tokenizer.grid(side, side)
        except (ValueError, JanusError):
            continue
        return tokenizer, torch.rand(2, 3, side, side) * (high - low) + low
    raise ConfigError(f"'{part.name}' takes no image of {' or '.join(map(str, SIDES))} pixels a side")


def _adaptor(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    try:
        return build(part, WIDTH // 2, WIDTH), torch.rand(2, *GRID, WIDTH // 2)
    except JanusError:  # it may ask for equal widths
        return build(part, WIDTH, WIDTH), torch.rand(2, *GRID, WIDTH)


def _head(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    hidden = torch.rand(2, 3, WIDTH)
    for several in (CODES, CODES[:2]):  # whatever it takes has to work: a model's tokenizer may have as many
        try:
            return build(part, WIDTH, several), hidden
        except (ValueError, JanusError):
            continue
    return build(part, WIDTH, CODES[:1]), hidden


def _backbone(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    backbone = build(part)
    return backbone, torch.randint(backbone.vocab_size, (2, TOKENS))


def _generation(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    path = build(part, WIDTH)
    return path, torch.randint(256, (2, 3, path.height, path.width), dtype=torch.uint8)


def _sampler(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    prompts = [prompt(1, 2, 3), prompt(4, 5)]
    return plugins.entry(part.slot, part.name).factory, SamplingExample(part.config, prompts, NumpySession)


def _source(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    source = build(part)
    return source, sorted({0, len(source) // 2})


def _tracker(part: ComponentSpec, build: ModelBuilder, plugins: Plugins) -> Example:
    def opened(folder: Path) -> Any:
        return build(part, folder)

    return opened, {"loss": 0.5, "lr": 1e-3}


EXAMPLES: Mapping[str, Callable[[ComponentSpec, ModelBuilder, Plugins], Example]] = {
    "understanding_encoders": _encoder,
    "image_tokenizers": _tokenizer,
    "adaptors": _adaptor,
    "heads": _head,
    "backbones": _backbone,
    "generation": _generation,
    "text_samplers": _sampler,
    "image_samplers": _sampler,
    "sources": _source,
    "trackers": _tracker,
}
