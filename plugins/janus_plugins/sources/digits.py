"""Real handwritten digits, to draw, to read and to talk about: scikit-learn's 1,797, at 32x32.

The scans (UCI, "Optical Recognition of Handwritten Digits") are 8x8 with 17 greys; they are enlarged with a
bicubic filter and shown as dark ink on paper. The split is fixed and has the same share of each digit
everywhere. Training images are turned, moved, scaled and slanted a little, differently each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from math import inf
from typing import Literal

import numpy as np
from PIL import Image

from janus_modular import (
    ComponentConfig,
    ImageInput,
    ImageTarget,
    Message,
    MissingExtraError,
    Registry,
    Sample,
    Segment,
    Source,
    Text,
    hookimpl,
)

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DRAW = ("Draw the digit {}.", "Draw {}.", "Please write {}.", "A handwritten {}.")
READ = ("Which digit is this?", "What number do you see?", "Read this digit.", "What is written here?")
ANSWER = "It is {}."
SHARES = {"train": (0, 4), "validation": (4, 5), "test": (5, 6)}  # sixths of each digit's scans


@dataclass
class DigitsConfig(ComponentConfig):
    """Which digits, and what to do with them."""

    task: Literal["draw", "read", "text"] = "draw"  # a caption to an image, an image to an answer, words
    split: Literal["train", "validation", "test"] = "train"  # which of the scans
    size: int = 32  # pixels a side
    augment: float = 1.0  # strength of the small affine changes; 0 leaves the scans as they are

    def __post_init__(self) -> None:
        """Refuse what makes no image."""
        if self.size < 1 or not 0 <= self.augment < inf:
            raise ValueError(
                f"size {self.size}, augment {self.augment}: expected pixels, at least 1, and a number of at"
                " least 0."
            )


class Digits:
    """The digits of one split as a source; also ``images`` and ``labels`` (same order), for measuring."""

    names = NAMES

    def __init__(self, config: DigitsConfig) -> None:
        self.config = config
        scans, labels = _load()
        first, last = SHARES[config.split]
        order = np.random.default_rng(0).permutation(len(labels))
        of_digit = [np.array_split(order[labels[order] == digit], 6)[first:last] for digit in range(10)]
        at = np.sort(np.concatenate([some for sixths in of_digit for some in sixths]))
        self.labels = labels[at]  # (len,)
        self.images = [_enlarge(scan, config.size) for scan in scans[at]]

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Return a digest of the scans, which other versions of scikit-learn could bring differently."""
        scans, labels = _load()
        return sha256(scans.tobytes() + labels.tobytes()).hexdigest()

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index`` in words and with changes drawn from ``rng``."""
        label = int(self.labels[index])
        if self.config.task == "text":
            return Sample([Message("user", [Text(_sentence(label, rng), True)])], False, "digits")
        image = _change(self.images[index], self.config.augment, rng)
        if self.config.task == "draw":
            question: list[Segment] = [Text(self.prompt(label, rng))]
            answer: list[Segment] = [ImageTarget(image)]
        else:
            question = [ImageInput(image), Text(_one_of(READ, rng))]
            answer = [Text(ANSWER.format(NAMES[label]), True)]
        return Sample([Message("user", question), Message("assistant", answer)], True, "digits")

    def prompt(self, label: int, rng: np.random.Generator) -> str:
        """Ask for a drawing of ``label``, in one of several ways."""
        name = NAMES[label] if rng.random() < 0.75 else str(label)
        return _one_of(DRAW, rng).format(name)


def _sentence(label: int, rng: np.random.Generator) -> str:
    """Say something true about a digit, in the words that prompts and answers use."""
    name, other = NAMES[label], int(rng.integers(10))
    sayings = [
        f"After {name} comes {NAMES[(label + 1) % 10]}.",
        f"The digit {label} is called {name}.",
        ANSWER.format(name),
        _one_of(DRAW, rng).format(name),
        f"{_one_of(READ, rng)} {ANSWER.format(name)}",
        f"{name} and {NAMES[other]} make {label + other}.",
    ]
    return _one_of(sayings, rng)


def _one_of(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _change(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Turn, scale, slant and move an image a little about its middle."""
    if not strength:
        return image
    turn, slant, grow, across, down = strength * rng.uniform(-1, 1, 5) * (0.17, 0.15, 0.1, 0.06, 0.06)
    cos, sin, zoom = np.cos(turn), np.sin(turn), np.exp(-grow)
    (a, b), (c, d) = zoom * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, slant], [0, 1]])
    middle = image.width / 2
    e = middle - a * middle - b * middle + across * image.width
    f = middle - c * middle - d * middle + down * image.width
    how = Image.Transform.AFFINE, (a, b, e, c, d, f), Image.Resampling.BICUBIC
    return image.transform(image.size, *how, fillcolor=255)


def _enlarge(scan: np.ndarray, size: int) -> Image.Image:
    """Turn a scan (8, 8) of inks 0 to 16 into a grey image on white paper, with a margin of a sixteenth."""
    ink = Image.fromarray(np.round(255 - scan * (255 / 16)).astype(np.uint8))
    margin = size // 16
    paper = Image.new("L", (size, size), 255)
    paper.paste(ink.resize((size - 2 * margin,) * 2, Image.Resampling.BICUBIC), (margin, margin))
    return paper


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the source 'digits'", "demo") from error
    digits = load_digits()
    return digits.images, digits.target


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Offer ``digits``."""
    registry.add("digits", Digits, DigitsConfig)
