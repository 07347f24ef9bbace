"""The slots: a typed registry for each, and the hooks by which plugins register components."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    ImageAutoencoder,
    ImageTokenizer,
    UnderstandingEncoder,
)
from janus_modular.objectives import Objective
from janus_modular.protocols import (
    CheckpointFormat,
    ImageSampler,
    ImageSamplerSettings,
    ImageSettingsT,
    Runtime,
    Scheduler,
    Source,
    TextSampler,
    TextSamplerSettings,
    TextSettingsT,
    Tracker,
)

PROJECT = "janus_modular"
API_VERSION = 1

MODEL_SLOTS = (
    "understanding_encoders",
    "image_tokenizers",
    "image_autoencoders",
    "adaptors",
    "heads",
    "backbones",
    "generation",
)
"""The slots of a model: their components are torch modules."""

SAMPLER_SETTINGS: dict[str, type[Any]] = {
    "text_samplers": TextSamplerSettings,
    "image_samplers": ImageSamplerSettings,
}
"""The slots of samplers, each with the base class of its samplers' settings."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered component: its factory, and the dataclass of its options."""

    name: str
    factory: Callable[..., T]
    config: type[Any]
    plugin: str  # the distribution or file that registered it
    slot: str
    families: tuple[str, ...] = ()  # model types that it builds, each by `config.model_type`

    def __str__(self) -> str:
        """Return a description of the component: slot, name and plugin."""
        return f"the {slot_label(self.slot)} '{self.name}' of {self.plugin}"

    def make(self, config: Any, *neighbours: Any, build: Callable[..., Any]) -> T:
        """Call the factory with ``config`` and ``neighbours``, the further arguments of its slot.

        A factory whose config contains components gets ``build(spec, *neighbours)`` as its last argument.

        Raises:
            MissingExtraError, MissingPackageError: the component needs a package that is not installed.
        """
        with reporting_missing_packages(str(self)):
            return self.factory(config, *neighbours, *([build] if holds_components(self.config) else []))


def holds_components(config: type[Any]) -> bool:
    """Return True if a config's dataclass has fields that are declared by ``component(slot)``."""
    return any("slot" in field.metadata for field in fields(config))


@dataclass
class Registry(Generic[T]):
    """The components of one slot, by name."""

    slot: str
    plugin: str = ""  # the plugin that is registering; set by the loader
    entries: dict[str, Entry[T]] = field(default_factory=dict)

    @overload
    def add(
        self: Registry[TextSampler[Any]],
        name: str,
        factory: TextSampler[TextSettingsT],
        config: type[TextSettingsT],
    ) -> None: ...
    @overload
    def add(
        self: Registry[ImageSampler[Any]],
        name: str,
        factory: ImageSampler[ImageSettingsT],
        config: type[ImageSettingsT],
    ) -> None: ...
    @overload
    def add(
        self, name: str, factory: Callable[..., T], config: type[Any], *, families: Iterable[str] = ()
    ) -> None: ...
    def add(
        self, name: str, factory: Callable[..., Any], config: type[Any], *, families: Iterable[str] = ()
    ) -> None:
        """Register ``factory`` under ``name``; ``config`` is the dataclass of its options.

        A sampler is registered itself, without a factory, with the dataclass of its settings. ``families``
        are the model types that the component builds, each by its option ``config.model_type``: where one is
        given as a component's name, the error names this component (of a third party: once it is loaded).

        Raises:
            PluginError: the name is taken, or ``config`` is not a dataclass, lacks fields that its slot
                requires, or has fields that it must not have.
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
                " 'revision'. Derive it from janus_modular.ComponentConfig"
            )
        base = SAMPLER_SETTINGS.get(self.slot)
        if base is not None and not issubclass(config, base):
            raise PluginError(
                f"the {slot_label(self.slot)} '{name}': its settings {config.__name__} lack"
                f" {' and '.join(option.name for option in fields(base))}. Derive them from"
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
                f"the {slot_label(self.slot)} '{name}' is registered by both {first} and {self.plugin}"
            )
        self.entries[name] = Entry(name, factory, config, self.plugin, self.slot, tuple(families))


class Hooks:
    """The hooks, one for each slot: a plugin implements its slot's hook and calls ``registry.add`` there.

    A factory whose config contains components (`janus_modular.component`) takes one more, last argument,
    ``build``, which builds them: ``build(spec, *neighbours)``.
    """

    @hookspec
    def register_understanding_encoders(self, registry: Registry[UnderstandingEncoder]) -> None:
        """Register understanding encoders, built as ``factory(config)``."""

    @hookspec
    def register_image_tokenizers(self, registry: Registry[ImageTokenizer]) -> None:
        """Register image tokenizers, built as ``factory(config)``."""

    @hookspec
    def register_image_autoencoders(self, registry: Registry[ImageAutoencoder]) -> None:
        """Register image autoencoders, built as ``factory(config)``."""

    @hookspec
    def register_adaptors(self, registry: Registry[Adaptor]) -> None:
        """Register adaptors, built as ``factory(config, input_dim, output_dim)``."""

    @hookspec
    def register_heads(self, registry: Registry[Head]) -> None:
        """Register image heads, built as ``factory(config, hidden_size, codebooks)``."""

    @hookspec
    def register_generation(self, registry: Registry[GenerationPath]) -> None:
        """Register generation paths, built as ``factory(config, hidden_size, build)``."""

    @hookspec
    def register_text_samplers(self, registry: Registry[TextSampler[Any]]) -> None:
        """Register text samplers: generator functions, each with the dataclass of its settings."""

    @hookspec
    def register_image_samplers(self, registry: Registry[ImageSampler[Any]]) -> None:
        """Register image samplers: generator functions, each with the dataclass of its settings."""

    @hookspec
    def register_backbones(self, registry: Registry[Backbone]) -> None:
        """Register backbones, built as ``factory(config)``."""

    @hookspec
    def register_sources(self, registry: Registry[Source]) -> None:
        """Register sources of training samples, built as ``factory(config)``."""

    @hookspec
    def register_objectives(self, registry: Registry[Objective]) -> None:
        """Register objectives of training, built as ``factory(config, model)``."""

    @hookspec
    def register_trackers(self, registry: Registry[Tracker]) -> None:
        """Register trackers, built as ``factory(config, folder)``."""

    @hookspec
    def register_formats(self, registry: Registry[CheckpointFormat]) -> None:
        """Register checkpoint formats, built as ``factory(config)``."""

    @hookspec
    def register_runtimes(self, registry: Registry[Runtime]) -> None:
        """Register runtimes of exported bundles, built as ``factory(config, folder)``."""

    @hookspec
    def register_schedulers(self, registry: Registry[Scheduler]) -> None:
        """Register schedulers of an engine's batch, built as ``factory(config)``."""


SLOTS = tuple(name.removeprefix("register_") for name in vars(Hooks) if name.startswith("register_"))
"""The names of the slots."""


def slot_label(slot: str) -> str:
    """Return a slot's name in the singular: ``image tokenizer``."""
    labels = {"generation": "generation path", "formats": "checkpoint format"}
    return labels.get(slot) or slot.removesuffix("s").replace("_", " ")


def a_component(slot: str) -> str:
    """Return a slot's name in the singular, with its article: ``an image tokenizer``."""
    label = slot_label(slot)
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
