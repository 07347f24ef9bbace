"""What the demo reports, as functions of images. All distances are between pixels in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Bar:
    """How good a figure has to be."""

    name: str
    least: float
    what: str  # in words


BARS = (
    Bar("reading_accuracy", 0.97, "held-out images read correctly"),
    Bar("drawing_accuracy", 0.97, "drawings recognised as what was asked for"),
    Bar("drawing_accuracy_t1", 0.95, "the same at temperature 1"),
    Bar("drawing_accuracy_t1_g1", 0.0, "the same without guidance"),
    Bar("classifier_accuracy", 0.98, "the judge of the drawings, on held-out images"),
    Bar("diversity_ratio", 0.6, "how far drawings of a class are apart, against real ones"),
    Bar("nearest_ratio", 0.9, "distance to the nearest training image, against real ones"),
    Bar("codes_used", 0.9, "share of the codebook in use on held-out images"),
    Bar("psnr_db", 21.0, "of held-out images through the image tokenizer"),
)


def flat(images: Sequence[Image.Image]) -> Array:
    """Return images of one size as greys (N, pixels) in [0, 1]."""
    return np.stack([np.asarray(one.convert("L"), np.float32).ravel() for one in images]) / np.float32(255)


def distances(a: Array, b: Array) -> Array:
    """Return the Euclidean distances (N, M) of rows (N, D) and (M, D)."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0))


def spread(images: Array, labels: NDArray[np.int64]) -> float:
    """Return the mean distance of two different images of a class, averaged over the classes."""
    means = []
    for label in np.unique(labels):
        of_class = images[labels == label]
        n = len(of_class)
        means.append(distances(of_class, of_class).sum() / (n * (n - 1)))
    return float(np.mean(means))


def nearest(images: Array, known: Array) -> float:
    """Return the mean distance to the nearest of ``known``."""
    return float(distances(images, known).min(1).mean())


def psnr(images: Array, restored: Array) -> float:
    """Return the peak signal-to-noise ratio in dB, of a peak of 1, averaged over images."""
    return float((-10 * np.log10(((images - restored) ** 2).mean(1))).mean())


def named(answer: str, names: Sequence[str]) -> int | None:
    """Return which one of ``names`` an answer says; None where it says none, or more than one."""
    said = [i for i, name in enumerate(names) if re.search(rf"\b{re.escape(name)}\b", answer.lower())]
    return said[0] if len(said) == 1 else None


def confusion(truth: NDArray[np.int64], found: Sequence[int | None], classes: int) -> NDArray[np.int64]:
    """Count (classes, classes + 1) what each class was taken for; the last column: for nothing."""
    table = np.zeros((classes, classes + 1), np.int64)
    for right, said in zip(truth, found, strict=True):
        table[right, classes if said is None else said] += 1
    return table
