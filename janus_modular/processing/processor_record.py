"""What processor.json holds: read with every value checked, since each decides how much a prompt fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from janus_modular.config.scalars import convert, words
from janus_modular.config.schema import SpecialTokens
from janus_modular.errors import ConfigError
from janus_modular.foreign import printable
from janus_modular.interfaces import PixelSpec

T = TypeVar("T")
OPTIONAL = {"template_variables"}  # which processors before it lack

MAX_SIZE = 2**27
"""Most positions, and pixels of an image, that a processor is made for: each prompt fills as much memory."""


@dataclass(frozen=True)
class Drawing:
    """The images that the model draws: their size in pixels, and the positions that one takes."""

    height: int
    width: int
    num_tokens: int


@dataclass
class ProcessorRecord:
    """What processor.json holds."""

    template: str
    system: str | None
    tokens: SpecialTokens
    pixels: PixelSpec
    image_tokens: int
    drawing: Drawing | None
    context: int | None
    suppress_tokens: list[str]
    template_variables: dict[str, Any] | None = None


def read_record(description: Mapping[str, Any]) -> ProcessorRecord:
    """Return the content of a processor.json, its types and sizes checked.

    Raises:
        ConfigError: a key is missing, unknown, of another type, or of a size that no processor has.
    """
    record = _typed(ProcessorRecord, description)
    drawing = record.drawing
    for name, number in {
        "image_tokens": record.image_tokens,
        "context": record.context or 1,
        "pixels": record.pixels.height * record.pixels.width,
        "drawing": max(drawing.height * drawing.width, drawing.num_tokens) if drawing else 1,
    }.items():
        if not 1 <= number <= MAX_SIZE:
            raise ConfigError(f"{name}: found {number:,}; expected from 1 to {MAX_SIZE:,}.")
    return record


def _typed(form: type[T], values: Any) -> T:
    """Return a JSON object as an instance of a dataclass, each value of the type that its field has.

    Raises:
        ConfigError: a key is missing, unknown, or of another type.
    """
    hints = get_type_hints(form)
    if not isinstance(values, Mapping) or not set(hints) - OPTIONAL <= set(values) <= set(hints):
        raise ConfigError(f"found {printable(repr(values), most=100)}; expected the keys {', '.join(hints)}.")
    typed: dict[str, Any] = {}
    for name, hint in hints.items():
        if name not in values:
            continue
        inner = next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
        if isinstance(inner, type) and (values[name] is not None or inner is hint):
            typed[name] = _typed(inner, values[name])
            continue
        try:
            typed[name] = convert(values[name], hint)
        except Exception as error:  # not all of OmegaConf's errors are of one class
            raise ConfigError(
                f"{name}: found {printable(repr(values[name]), most=100)}; expected {words(hint)}."
            ) from error
    return form(**typed)
