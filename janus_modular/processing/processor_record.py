"""The content of processor.json, with every value checked: the values decide how large prompts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from janus_modular.config.scalars import convert, words
from janus_modular.config.schema import SpecialTokens
from janus_modular.errors import ConfigError
from janus_modular.foreign import printable
from janus_modular.interfaces import PixelSpec
from janus_modular.positions import POSITION_AXES, PositionRule
from janus_modular.suggest import did_you_mean

T = TypeVar("T")
OF_RESIZE = {"multiple", "max_tiles"}
"""Keys of pixels that only some ways to resize have."""

# Older files lack these keys.
OPTIONAL = {
    "hidden_condition",
    "image_tokens_follow_size",
    *OF_RESIZE,
    "positions",
    "template_variables",
    "together",
}

MAX_SIZE = 2**27
"""Most positions, and pixels of an image, of a processor: each prompt takes as much memory."""


@dataclass(frozen=True)
class Drawing:
    """The size of generated images in pixels, and the number of positions that each takes."""

    height: int
    width: int
    num_tokens: int
    hidden_condition: bool = False  # a dropped condition is not seen, but for its first position

    def to_dict(self) -> dict[str, Any]:
        """Return the entry in processor.json, in which a condition that is seen is not mentioned."""
        values = asdict(self)
        if not self.hidden_condition:
            del values["hidden_condition"]
        return values


def pixels_to_dict(pixels: PixelSpec) -> dict[str, Any]:
    """Return the entry of a `PixelSpec` in processor.json, without options of other ways to resize."""
    values = asdict(pixels)
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return {name: value for name, value in values.items() if name not in OF_RESIZE or value is not None}


@dataclass
class ProcessorRecord:
    """The content of processor.json."""

    template: str
    system: str | None
    tokens: SpecialTokens
    pixels: PixelSpec
    image_tokens: int
    drawing: Drawing | None
    context: int | None
    suppress_tokens: list[str]
    template_variables: dict[str, Any] | None = None
    together: list[Literal["understanding"]] | None = None  # only where the model's config has it
    positions: PositionRule | None = None  # only where the backbone has position ids
    image_tokens_follow_size: bool | None = None  # True: only in native sizes


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
    if record.image_tokens_follow_size:
        _check_follows_size(record)
    if record.positions and record.positions.grid[0] * record.positions.grid[1] != record.image_tokens:
        rows, columns = record.positions.grid
        raise ConfigError(
            f"positions.grid: found {rows}x{columns}; expected {record.image_tokens} positions, which an"
            " image takes (image_tokens)."
        )
    if record.positions and not set(record.positions.axes) <= set(POSITION_AXES):
        raise ConfigError(
            f"positions.axes: found {printable(', '.join(record.positions.axes))}; expected some of"
            f" {', '.join(POSITION_AXES)}."
        )
    return record


def _check_follows_size(record: ProcessorRecord) -> None:
    pixels = record.pixels
    if pixels.multiple is None:
        raise ConfigError(
            f"image_tokens_follow_size: found true, with pixels of resize {pixels.resize}; expected native."
        )
    most = (pixels.height // pixels.multiple) * (pixels.width // pixels.multiple)
    if most != record.image_tokens:
        raise ConfigError(
            f"image_tokens: found {record.image_tokens}; expected {most}, the positions of the largest image."
        )


def _typed(record_type: type[T], values: Any) -> T:
    """Return a JSON object as an instance of a dataclass, each value of the type that its field has.

    Raises:
        ConfigError: a key is missing, unknown, or of another type.
    """
    hints = get_type_hints(record_type)
    if not isinstance(values, Mapping):
        raise ConfigError(f"found {printable(repr(values), most=100)}; expected the keys {', '.join(hints)}.")
    if unknown := sorted(map(str, set(values) - set(hints))):
        guesses = [f"{printable(key)}: {guess}" for key in unknown if (guess := did_you_mean(key, hints))]
        message = f"found the keys {printable(', '.join(unknown))}; expected the keys {', '.join(hints)}."
        raise ConfigError(" ".join([message, *guesses]))
    if missing := [key for key in hints if key not in values and key not in OPTIONAL]:
        raise ConfigError(f"found no {', '.join(missing)}; expected the keys {', '.join(hints)}.")
    typed: dict[str, Any] = {}
    for name, hint in hints.items():
        if name not in values:
            continue
        inner = next((option for option in (hint, *get_args(hint)) if is_dataclass(option)), None)
        if isinstance(inner, type) and (values[name] is not None or inner is hint):
            typed[name] = _typed(inner, values[name])
            continue
        try:
            typed[name] = convert(values[name], hint)
        except Exception as error:  # not all of OmegaConf's errors are of one class
            raise ConfigError(
                f"{name}: found {printable(repr(values[name]), most=100)}; expected {words(hint)}."
            ) from error
    return record_type(**typed)
