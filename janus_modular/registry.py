"""Typed registries, one for each slot, and the hooks through which plugins fill them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Generic, TypeVar, overload

import pluggy

from janus_modular.errors import PluginError, reporting_missing_packages
from janus_modular.interfaces import (
    Adaptor,
    Backbone,
    ComponentConfig,
    GenerationPath,
    Head,
    ImageTokenizer,
    UnderstandingEncoder,
)
from janus_modular.protocols import (
    CheckpointFormat,
    ImageSampler,
    ImageSamplerSettings,
    ImageSettings,
    Runtime,
    Source,
    TextSampler,
    TextSamplerSettings,
    TextSettings,
    Tracker,
)

PROJECT = "janus_modular"
API_VERSION = 1

MODEL_SLOTS = (
    "understanding_encoders",
    "image_tokenizers",
    "adaptors",
    "heads",
    "backbones",
    "generation",
)
"""The slots that are filled by modules of torch: the parts of a model."""

SAMPLER_SETTINGS: dict[str, type[Any]] = {
    "text_samplers": TextSamplerSettings,
    "image_samplers": ImageSamplerSettings,
}
"""The slots that are filled by samplers, each with what the settings of its samplers inherit from."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """One registered component: how it is built, and the dataclass that holds its options."""

    name: str
    factory: Callable[..., T]
    config: type[Any]
    plugin: str  # the module or distribution that offered it
    slot: str

    def __str__(self) -> str:
        """Name the component in words, with its slot and its plugin."""
        return f"the {slot_label(self.slot)} '{self.name}' of {self.plugin}"

    def make(self, config: Any, *neighbours: Any, build: Callable[..., Any]) -> T:
        """Call the factory with ``config`` and ``neighbours``, what its slot passes beside it.

        One whose config holds components gets ``build`` as the last argument: ``build(part, *neighbours)``.

        Raises:
            MissingExtraError, MissingPackageError: the component needs a package that is not installed.
        """
        with reporting_missing_packages(str(self)):
            return self.factory(config, *neighbours, *([build] if holds_components(self.config) else []))


def holds_components(config: type[Any]) -> bool:
    """Return True if a config's dataclass has fields that are declared by ``part(slot)``."""
    return any("slot" in field.metadata for field in fields(config))


@dataclass
class Registry(Generic[T]):
    """The components of one slot, by name."""

    slot: str
    plugin: str = ""  # who is registering now; set by the loader
    entries: dict[str, Entry[T]] = field(default_factory=dict)

    @overload
    def add(
        self: Registry[TextSampler[Any]],
        name: str,
        factory: TextSampler[TextSettings],
        config: type[TextSettings],
    ) -> None: ...
    @overload
    def add(
        self: Registry[ImageSampler[Any]],
        name: str,
        factory: ImageSampler[ImageSettings],
        config: type[ImageSettings],
    ) -> None: ...
    @overload
    def add(self, name: str, factory: Callable[..., T], config: type[Any]) -> None: ...
    def add(self, name: str, factory: Callable[..., Any], config: type[Any]) -> None:
        """Offer ``factory`` under ``name``; ``config`` is the dataclass of its options.

        A sampler is registered itself, in the place of a factory, with the dataclass of its settings.

        Raises:
            PluginError: the name is taken, or ``config`` is no dataclass, has a field that cannot be set, or
                lacks what its slot wants of it.
        """
        if not (isinstance(config, type) and is_dataclass(config)):
            raise PluginError(
                f"the {slot_label(self.slot)} '{name}': its config must be a dataclass, not {config!r}"
            )
        if "name" in (field.name for field in fields(config)):
            raise PluginError(
                f"the {slot_label(self.slot)} '{name}': its config has a field 'name', but in a config file"
                " 'name' chooses the component. Rename the field"
            )
        if self.slot in MODEL_SLOTS and not issubclass(config, ComponentConfig):
            raise PluginError(
                f"the {slot_label(self.slot)} '{name}': its config {config.__name__} lacks 'pretrained' and"
                " 'revision'. Let it inherit from janus_modular.ComponentConfig"
            )
        base = SAMPLER_SETTINGS.get(self.slot)
        if base is not None and not issubclass(config, base):
            raise PluginError(
                f"the {slot_label(self.slot)} '{name}': its settings {config.__name__} lack"
                f" {' and '.join(option.name for option in fields(base))}. Let them inherit from"
                f" janus_modular.{base.__name__}"
            )
        if base is not None and holds_components(config):
            raise PluginError(
                f"the {slot_label(self.slot)} '{name}': its settings hold a component, but settings are given"
                " at each call (temperature=0.5). Give them plain values"
            )
        if name in self.entries:
            first = self.entries[name].plugin
            raise PluginError(
                f"the {slot_label(self.slot)} '{name}' is offered by both {first} and {self.plugin}"
            )
        self.entries[name] = Entry(name, factory, config, self.plugin, self.slot)


class Hooks:
    """One hook a slot: a plugin implements the one it fills, and calls ``registry.add``.

    A factory whose config holds components (`janus_modular.component`) takes one argument more, the last:
    what builds them, ``build(spec, *neighbours)``.
    """

    @hookspec
    def register_understanding_encoders(self, registry: Registry[UnderstandingEncoder]) -> None:
        """Offer understanding encoders, built as ``factory(config)``."""

    @hookspec
    def register_image_tokenizers(self, registry: Registry[ImageTokenizer]) -> None:
        """Offer image tokenizers, built as ``factory(config)``."""

    @hookspec
    def register_adaptors(self, registry: Registry[Adaptor]) -> None:
        """Offer adaptors, built as ``factory(config, input_dim, output_dim)``."""

    @hookspec
    def register_heads(self, registry: Registry[Head]) -> None:
        """Offer image heads, built as ``factory(config, hidden_size, codebooks)``."""

    @hookspec
    def register_generation(self, registry: Registry[GenerationPath]) -> None:
        """Offer generation paths, built as ``factory(config, hidden_size, build)``."""

    @hookspec
    def register_text_samplers(self, registry: Registry[TextSampler[Any]]) -> None:
        """Offer text samplers: generator functions, each with the dataclass of its settings."""

    @hookspec
    def register_image_samplers(self, registry: Registry[ImageSampler[Any]]) -> None:
        """Offer image samplers: generator functions, each with the dataclass of its settings."""

    @hookspec
    def register_backbones(self, registry: Registry[Backbone]) -> None:
        """Offer backbones, built as ``factory(config)``."""

    @hookspec
    def register_sources(self, registry: Registry[Source]) -> None:
        """Offer sources of training samples, built as ``factory(config)``."""

    @hookspec
    def register_trackers(self, registry: Registry[Tracker]) -> None:
        """Offer trackers, built as ``factory(config, folder)``."""

    @hookspec
    def register_formats(self, registry: Registry[CheckpointFormat]) -> None:
        """Offer checkpoint formats, built as ``factory(config)``."""

    @hookspec
    def register_runtimes(self, registry: Registry[Runtime]) -> None:
        """Offer runtimes of exported bundles, built as ``factory(config, folder)``."""


SLOTS = tuple(name.removeprefix("register_") for name in vars(Hooks) if name.startswith("register_"))
"""The names of the slots: one hook each."""


def slot_label(slot: str) -> str:
    """Name one component of a slot in words: ``image tokenizer``."""
    labels = {"generation": "generation path", "formats": "checkpoint format"}
    return labels.get(slot) or slot.removesuffix("s").replace("_", " ")


def a_component(slot: str) -> str:
    """Name one component of a slot with its article: ``an image tokenizer``."""
    label = slot_label(slot)
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
