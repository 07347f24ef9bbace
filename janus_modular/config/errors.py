"""What is wrong with a config: one fault for each thing to put right, and the error that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from janus_modular.errors import ConfigError
from janus_modular.foreign import printable


@dataclass(frozen=True)
class FieldError:
    """One thing that cannot stay as it is."""

    path: str  # of the key: understanding.encoder.layers; "" is the whole config
    found: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        """Write it on a line (or on several, where the cure has more to say)."""
        path, found = printable(self.path or "the config", most=200), printable(self.found, most=2000)
        text = f"{path}: {found}; expected {self.expected}." if self.expected else f"{path}: {found}"
        return f"{text} {self.hint}".rstrip().replace("\n", "\n    ")


def config_error(errors: Sequence[FieldError], *, of_components: bool = True) -> ConfigError:
    """Return one error that lists them all; of a config of components, also where their options are told."""
    count = "an error" if len(errors) == 1 else f"{len(errors)} errors"
    lines = "\n".join(f"  {error}" for error in errors)
    more = "\nWhat a component takes: janus-modular plugins show NAME" if of_components else ""
    return ConfigError(f"the config has {count}:\n{lines}{more}", errors)
