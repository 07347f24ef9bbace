"""Builds components one by one, whatever their slot, without torch.

`janus_modular.model.build.ModelBuilder` builds parts of a model, which it checks, and loads their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janus_modular.config.errors import FieldError, config_error
from janus_modular.config.size_limits import largest_numbers
from janus_modular.errors import ConfigError, DescriptionError, JanusError
from janus_modular.interfaces import ComponentSpec
from janus_modular.plugins import Plugins
from janus_modular.registry import MODEL_SLOTS, Entry, Hooks


class Builder:
    """Builds components of the slots that are no parts of a model: sources, trackers, runtimes, formats.

    Handed to components that are made of others: ``build(config.tokenizer)``.
    """

    def __init__(self, plugins: Plugins, *, paths: Mapping[int, str] | None = None) -> None:
        self.plugins = plugins
        self.paths = paths or {}  # of parts in the config, by `id`: for errors

    def __call__(self, part: ComponentSpec, *neighbours: Any) -> Any:
        """Build one component; ``neighbours`` are what its slot's factory takes beside the config.

        A component whose config holds parts itself gets this builder as its last argument.

        Raises:
            ConfigError: the component refuses its options or its neighbours, or does not fit its slot.
        """
        entry = self.plugins.entry(part.slot, part.name)
        try:
            component = entry.make(part.config, *neighbours, build=self)
        except Exception as error:
            if isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError":
                raise  # nothing that other options would cure
            if isinstance(error, DescriptionError):
                raise self._contradiction(part, error) from error
            if isinstance(error, JanusError) and (not isinstance(error, ConfigError) or error.errors):
                raise
            reason = _told(error, part.slot)
            if isinstance(error, MemoryError | OverflowError) or "memory" in reason or "overflow" in reason:
                reason += f". Its largest numbers: {largest_numbers(part.config)}"
            raise self._refusal(part, entry, reason) from error
        if part.slot in MODEL_SLOTS:
            self._complete(component, part, entry)
        return component

    def _complete(self, module: Any, part: ComponentSpec, entry: Entry[Any]) -> None:
        """Hold a part of the model to its slot's interface, and load its weights: `ModelBuilder` does."""
        raise self._refusal(part, entry, "parts of a model are not built here.")

    def _contradiction(self, part: ComponentSpec, error: DescriptionError) -> ConfigError:
        """Return the error that says, for each option, what the weights' own description says instead."""
        path = self.paths.get(id(part), part.slot)
        hint = f"{path}.{error.drop}=null takes all of it from there." if error.drop else ""
        errors = [
            FieldError(
                f"{path}.{one.key}",
                f"found {one.written!r}",
                f"{one.described!r}, as {error.source} describes its weights",
                hint if one is error.differences[-1] else "",
            )
            for one in error.differences
        ]
        return config_error(errors, of_components=False)

    def _refusal(self, part: ComponentSpec, entry: Entry[Any], reason: str) -> ConfigError:
        found = f"{entry} cannot be built: {reason}"
        return config_error([FieldError(self.paths.get(id(part), part.slot), found, "")])


def _told(error: Exception, slot: str) -> str:
    """Return what an error has to say: options are refused in words, other errors need their type."""
    if isinstance(error, ValueError | ConfigError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, TypeError):
        said += f" (for its author: {getattr(Hooks, f'register_{slot}').__doc__})"
    return said
