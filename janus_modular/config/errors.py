"""Errors of single config keys, and the ConfigError that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from janus_modular.errors import ConfigError, install_hint
from janus_modular.foreign import printable


@dataclass(frozen=True)
class FieldError:
    """An invalid config key or value: what the problem is, what was expected, and how to fix it."""

    path: str  # of the key: understanding.encoder.layers; "" is the whole config
    problem: str
    expected: str  # "" where the problem says all
    hint: str = ""
    extras: tuple[str, ...] = ()  # that are to be installed; `config_error` has one line for all of them

    def __str__(self) -> str:
        """Format the error as one line, or as several where the hint has line breaks."""
        path, problem = printable(self.path, most=200), printable(self.problem, most=2000)
        text = f"{path}: {problem}" if path else problem
        text = f"{text}; expected {self.expected}." if self.expected else text
        return f"{text} {self.hint}".rstrip().replace("\n", "\n    ")


def config_error(
    errors: Sequence[FieldError], *, of_components: bool = True, subject: str = "the config"
) -> ConfigError:
    """Return a ConfigError that lists ``errors``.

    With ``of_components`` it also names the command that lists a component's options. One line installs all
    missing extras. ``subject`` is what has the errors.
    """
    count = "an error" if len(errors) == 1 else f"{len(errors)} errors"
    lines = [f"{subject} has {count}:", *(f"  {error}" for error in errors)]
    if extras := list(dict.fromkeys(extra for error in errors for extra in error.extras)):
        lines.append(f"Install what is missing: {install_hint(extras)}")
    if of_components and not all(error.extras for error in errors):
        lines.append("See a component's options with: janus-modular plugins show NAME")
    return ConfigError("\n".join(lines), errors)
