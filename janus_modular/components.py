"""Builds components of any slot from their specs, without torch.

`janus_modular.model.build.ModelBuilder` builds the components of a model: it also checks them and loads
their weights.
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
    """Builds components outside the model: sources, trackers, runtimes, formats.

    Components that contain other components receive it as ``build``: ``build(config.tokenizer)``.
    """

    def __init__(self, plugins: Plugins, *, paths: Mapping[int, str] | None = None) -> None:
        self.plugins = plugins
        self.paths = paths or {}  # config path of each spec, by `id`: for errors

    def __call__(self, spec: ComponentSpec, *neighbours: Any) -> Any:
        """Build a component; ``neighbours`` are the further arguments of its slot's factory.

        A factory whose config contains components gets this builder as its last argument.

        Raises:
            ConfigError: the component rejects its options or arguments, or does not implement its interface.
        """
        entry = self.plugins.entry(spec.slot, spec.name)
        try:
            component = entry.make(spec.config, *neighbours, build=self)
        except Exception as error:
            if isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError":
                raise  # other options would not help
            if isinstance(error, DescriptionError):
                raise self._description_error(spec, error) from error
            if isinstance(error, JanusError) and (not isinstance(error, ConfigError) or error.errors):
                raise
            reason = _reason_of(error, spec.slot)
            if isinstance(error, MemoryError | OverflowError) or "memory" in reason or "overflow" in reason:
                reason += f". Its largest numbers: {largest_numbers(spec.config)}"
            raise self._build_error(spec, entry, reason) from error
        if spec.slot in MODEL_SLOTS:
            self._complete(component, spec, entry)
        return component

    def _complete(self, module: Any, spec: ComponentSpec, entry: Entry[Any]) -> None:
        """Check a model component against its interface and load its weights; see `ModelBuilder`."""
        raise self._build_error(spec, entry, "components of a model are built by ModelBuilder.")

    def _description_error(self, spec: ComponentSpec, error: DescriptionError) -> ConfigError:
        """Return the error that lists the options which differ from the weights' own description."""
        path = self.paths.get(id(spec), spec.slot)
        hint = f"{path}.{error.drop}=null takes all values from there." if error.drop else ""
        errors = [
            FieldError(
                f"{path}.{difference.key}",
                f"found {difference.written!r}",
                f"{difference.described!r}, as {error.source} describes its weights",
                hint if difference is error.differences[-1] else "",
            )
            for difference in error.differences
        ]
        return config_error(errors, of_components=False)

    def _build_error(self, spec: ComponentSpec, entry: Entry[Any], reason: str) -> ConfigError:
        problem = f"{entry} cannot be built: {reason}"
        return config_error([FieldError(self.paths.get(id(spec), spec.slot), problem, "")])


def _reason_of(error: Exception, slot: str) -> str:
    """Return the text of a component's error, with its type unless the component rejects its options."""
    if isinstance(error, ValueError | ConfigError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, TypeError):
        reason += f" (for its author: {getattr(Hooks, f'register_{slot}').__doc__})"
    return reason
