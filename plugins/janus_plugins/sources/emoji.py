"""Emoji with their names, to read, to draw and to write about, from the npm package emoji-datasource-twitter.

Its ``emoji.json`` names each image ("RED APPLE"), and its folders hold them at 64 pixels; ``make emoji``
fetches Twitter's (Twemoji, CC BY 4.0). Each image has a name of its own. One name in ten is held out: its
image is in no sample of the split ``train``, though its words may occur in other names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from janus_modular import (
    ComponentConfig,
    DataError,
    ImageInput,
    ImageTarget,
    Message,
    Registry,
    Sample,
    Segment,
    Source,
    Text,
    hookimpl,
    list_briefly,
)

DRAW = ("Draw: {}.", "{}.", "An image of: {}.")
READ = ("What is this?", "What does the image show?")
ANSWER = "{}."
HELD_OUT = 10
"""One name in this many is held out."""


@dataclass
class EmojiConfig(ComponentConfig):
    """The emoji, and the task."""

    path: str = ".cache/images"  # the folder with emoji.json and img/
    images: str = "img/twitter/64"  # the folder of the images in it
    task: Literal["draw", "read", "text"] = "draw"  # image from name, name from image, text
    split: Literal["train", "test"] = "train"  # which of the names
    categories: list[str] = field(default_factory=list)  # of emoji.json, such as Food & Drink; default: all
    size: int = 32  # pixels a side
    shift: int = 0  # training images are moved by up to this many pixels

    def __post_init__(self) -> None:
        """Check that the options make an image."""
        if self.size < 1 or not 0 <= self.shift < self.size:
            raise ValueError(
                f"size {self.size}, shift {self.shift}: expected pixels, at least 1, and a shift from 0 to"
                " below size."
            )


class Emoji:
    """The emoji of a split as a source; ``images`` and ``names``, in the same order, are for evaluation."""

    def __init__(self, config: EmojiConfig) -> None:
        """Read the images of a split.

        Raises:
            DataError: the package is not in ``path``, it has no such category, or an image is missing.
        """
        self.config = config
        records = _of_categories(_read_records(Path(config.path).expanduser()), config.categories)
        order = np.random.default_rng(0).permutation(len(records))
        last = len(records) // HELD_OUT
        chosen = order[:last] if config.split == "test" else order[last:]
        self._records = [records[i] for i in sorted(chosen)]
        folder = Path(config.path).expanduser() / config.images
        self.images = [_open(folder / record["image"], config.size) for record in self._records]
        self.names: Sequence[str] = [record["name"].lower() for record in self._records]
        self.labels = np.arange(len(self.names))  # (len,)

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Return a digest of the images and their names."""
        digest = sha256("\n".join(self.names).encode())
        for image in self.images:
            digest.update(image.tobytes())
        return digest.hexdigest()

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index``; ``rng`` chooses its wording, and where its image lies."""
        if self.config.task == "text":
            return Sample([Message("user", [Text(self._sentence(index, rng), True)])], False, "emoji")
        image = _moved(self.images[index], self.config.shift, rng)
        if self.config.task == "draw":
            question: list[Segment] = [Text(self.prompt(index, rng))]
            answer: list[Segment] = [ImageTarget(image)]
        else:
            question = [ImageInput(image), Text(_choice(READ, rng))]
            answer = [Text(ANSWER.format(self.names[index]), True)]
        return Sample([Message("user", question), Message("assistant", answer)], True, "emoji")

    def prompt(self, label: int, rng: np.random.Generator) -> str:
        """Return a prompt for a drawing of ``names[label]``, in random wording."""
        return _choice(DRAW, rng).format(self.names[label])

    def _sentence(self, index: int, rng: np.random.Generator) -> str:
        """Return a true sentence about an emoji, in the words of prompts and answers."""
        record, name = self._records[index], self.names[index]
        sentences = [
            f"{name} belongs to {record['category'].lower()}.",
            f"{_choice(READ, rng)} {ANSWER.format(name)}",
            self.prompt(index, rng),
        ]
        return _choice(sentences, rng)


def _read_records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "emoji.json"
    if not file.is_file():
        raise DataError(
            f"emoji: {file} does not exist; expected the npm package emoji-datasource-twitter. In a checkout,"
            " `make emoji` fetches it; elsewhere, unpack it, and set `path` to its folder."
        )
    return json.loads(file.read_text("utf-8"))


def _of_categories(records: list[dict[str, Any]], categories: Sequence[str]) -> list[dict[str, Any]]:
    known = {record["category"] for record in records}
    if unknown := [category for category in categories if category not in known]:
        raise DataError(
            f"emoji: categories: found {list_briefly(unknown)}; expected some of {', '.join(sorted(known))}"
        )
    return [record for record in records if not categories or record["category"] in categories]


def _open(file: Path, size: int) -> Image.Image:
    """Return an image on white, scaled to ``size`` pixels a side."""
    try:
        with Image.open(file) as image:
            drawn = image.convert("RGBA")
    except OSError as error:
        raise DataError(f"emoji: {file} cannot be read: {error}. Fetch the package again.") from error
    paper = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    return paper.resize((size, size), Image.Resampling.LANCZOS)


def _moved(image: Image.Image, shift: int, rng: np.random.Generator) -> Image.Image:
    """Return an image on white, moved by up to ``shift`` pixels."""
    if not shift:
        return image
    across, down = (int(distance) for distance in rng.integers(-shift, shift + 1, 2))
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, (across, down))
    return paper


def _choice(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Register ``emoji``."""
    registry.add("emoji", Emoji, EmojiConfig)
