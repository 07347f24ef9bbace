"""Builds components of any slot from their specs, without torch.

`janus_modular.model.build.ModelBuilder` builds the components of a model, and loads their weights.
"""

from __future__ import annotations

from typing import Any

from janus_modular.config.errors import FieldError, config_error
from janus_modular.config.size_limits import largest_numbers
from janus_modular.errors import ConfigError, DescriptionError, JanusError
from janus_modular.interfaces import ComponentSpec
from janus_modular.plugins import Plugins
from janus_modular.registry import MODEL_SLOTS, Entry, Hooks


class Builder:
    """Builds components that are not torch modules: sources, trackers, runtimes, checkpoint formats.

    A component whose config holds other components gets a builder too: ``build(config.tokenizer)``.
    """

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins

    def __call__(self, spec: ComponentSpec, *neighbours: Any) -> Any:
        """Build a component; ``neighbours`` are the arguments that its slot's factory takes after the config.

        Raises:
            ConfigError: the component rejects its options or its neighbours, or does not fit its slot.
        """
        entry = self.plugins.entry(spec.slot, spec.name)
        try:
            component = entry.make(spec.config, *neighbours, build=self)
        except Exception as error:
            if isinstance(error, OSError) or type(error).__name__ == "OutOfMemoryError":
                raise  # other options would not help
            if isinstance(error, DescriptionError):
                raise _description_error(spec, error) from error
            if isinstance(error, JanusError) and (not isinstance(error, ConfigError) or error.errors):
                raise
            reason = _reason_of(error, spec.slot)
            if isinstance(error, MemoryError | OverflowError) or "memory" in reason or "overflow" in reason:
                reason += f". Its largest numbers: {largest_numbers(spec.config)}"
            raise build_error(spec, entry, reason) from error
        if spec.slot in MODEL_SLOTS:
            self._complete(component, spec, entry)
        return component

    def _complete(self, module: Any, spec: ComponentSpec, entry: Entry[Any]) -> None:
        """Check a model's component against its slot's interface and load its weights (`ModelBuilder`)."""
        raise build_error(spec, entry, "components of a model are built by ModelBuilder.")


def build_error(spec: ComponentSpec, entry: Entry[Any], reason: str) -> ConfigError:
    """Return the error for a component that cannot be built."""
    return config_error([FieldError(spec.path or spec.slot, f"{entry} cannot be built: {reason}", "")])


def _description_error(spec: ComponentSpec, error: DescriptionError) -> ConfigError:
    """Return the error that lists the options which differ from the weights' own description."""
    path = spec.path or spec.slot
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


def _reason_of(error: Exception, slot: str) -> str:
    """Return the text of an error: a ValueError's is written for users, that of others needs their type."""
    if isinstance(error, ValueError | ConfigError):
        return str(error)
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, TypeError):
        reason += f" (for its author: {getattr(Hooks, f'register_{slot}').__doc__})"
    return reason
