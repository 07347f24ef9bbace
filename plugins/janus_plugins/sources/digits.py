"""Real handwritten digits, to read, to draw and to write about: scikit-learn's 1,797, at 32x32.

The scans (UCI, "Optical Recognition of Handwritten Digits") are 8x8 with 17 greys; they are enlarged with a
bicubic filter and shown as dark ink on paper. The split is fixed and has the same share of each digit
everywhere. Training images are rotated, moved, scaled and sheared a little, differently each time.
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
from sklearn.datasets import load_digits

from janus_modular import (
    ComponentConfig,
    ImageInput,
    ImageTarget,
    Message,
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
    """The digits, and the task."""

    task: Literal["draw", "read", "text"] = "draw"  # image from caption, answer from image, text
    split: Literal["train", "validation", "test"] = "train"  # which of the scans
    size: int = 32  # pixels a side
    augment: float = 1.0  # strength of the small affine changes; 0 leaves the scans as they are

    def __post_init__(self) -> None:
        """Check that the options make an image."""
        if self.size < 1 or not 0 <= self.augment < inf:
            raise ValueError(
                f"size {self.size}, augment {self.augment}: expected pixels, at least 1, and a number of at"
                " least 0."
            )


class Digits:
    """The digits of a split as a source; ``images`` and ``labels``, in the same order, are for evaluation."""

    names = NAMES

    def __init__(self, config: DigitsConfig) -> None:
        self.config = config
        scans, labels = _load()
        first, last = SHARES[config.split]
        order = np.random.default_rng(0).permutation(len(labels))
        sixths_by_digit = [
            np.array_split(order[labels[order] == digit], 6)[first:last] for digit in range(10)
        ]
        chosen = np.sort(np.concatenate([sixth for sixths in sixths_by_digit for sixth in sixths]))
        self.labels = labels[chosen]  # (len,)
        self.images = [_enlarge(scan, config.size) for scan in scans[chosen]]

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Return a digest of the scans, which may differ between versions of scikit-learn."""
        scans, labels = _load()
        return sha256(scans.tobytes() + labels.tobytes()).hexdigest()

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index``; ``rng`` chooses its wording and its augmentation."""
        label = int(self.labels[index])
        if self.config.task == "text":
            return Sample([Message("user", [Text(_sentence(label, rng), True)])], False, "digits")
        image = _change(self.images[index], self.config.augment, rng)
        if self.config.task == "draw":
            question: list[Segment] = [Text(self.prompt(label, rng))]
            answer: list[Segment] = [ImageTarget(image)]
        else:
            question = [ImageInput(image), Text(_choice(READ, rng))]
            answer = [Text(ANSWER.format(NAMES[label]), True)]
        return Sample([Message("user", question), Message("assistant", answer)], True, "digits")

    def prompt(self, label: int, rng: np.random.Generator) -> str:
        """Return a prompt for a drawing of ``label``, in random wording."""
        name = NAMES[label] if rng.random() < 0.75 else str(label)
        return _choice(DRAW, rng).format(name)


def _sentence(label: int, rng: np.random.Generator) -> str:
    """Return a true sentence about a digit, in the words of prompts and answers."""
    name, second = NAMES[label], int(rng.integers(10))
    sentences = [
        f"After {name} comes {NAMES[(label + 1) % 10]}.",
        f"The digit {label} is called {name}.",
        ANSWER.format(name),
        _choice(DRAW, rng).format(name),
        f"{_choice(READ, rng)} {ANSWER.format(name)}",
        f"{name} and {NAMES[second]} make {label + second}.",
    ]
    return _choice(sentences, rng)


def _choice(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _change(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Return an image rotated, scaled, sheared and moved a little about its centre."""
    if not strength:
        return image
    angle, shear, growth, across, down = strength * rng.uniform(-1, 1, 5) * (0.17, 0.15, 0.1, 0.06, 0.06)
    cos, sin, zoom = np.cos(angle), np.sin(angle), np.exp(-growth)
    (a, b), (c, d) = zoom * np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]])
    middle = image.width / 2
    e = middle - a * middle - b * middle + across * image.width
    f = middle - c * middle - d * middle + down * image.width
    transform = Image.Transform.AFFINE, (a, b, e, c, d, f), Image.Resampling.BICUBIC
    return image.transform(image.size, *transform, fillcolor=255)


def _enlarge(scan: np.ndarray, size: int) -> Image.Image:
    """Return a scan (8, 8), values 0 to 16, as a grey image with dark ink and a margin of a sixteenth."""
    ink = Image.fromarray(np.round(255 - scan * (255 / 16)).astype(np.uint8))
    margin = size // 16
    paper = Image.new("L", (size, size), 255)
    paper.paste(ink.resize((size - 2 * margin,) * 2, Image.Resampling.BICUBIC), (margin, margin))
    return paper


@cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    return digits.images, digits.target


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Register ``digits``."""
    registry.add("digits", Digits, DigitsConfig)
