"""Asks a trained model about held-out images and lets it draw, through the API that everybody uses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_modular.janus import Janus
from janus_modular.sequence import Text
from janus_plugins.demo.labelled_images import LabelledImages
from janus_plugins.demo.schema import DrawingConfig

AT_ONCE = 100  # rows of a batch


@dataclass
class Answers:
    """What was asked about each held-out image, and what came back."""

    questions: list[str]
    answers: list[str]
    found: list[int | None]  # the class that an answer names
    truth: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Return the share of right answers; an answer that names no class, or two, is wrong."""
        return float(np.mean([said == right for said, right in zip(self.found, self.truth, strict=True)]))


@dataclass
class Drawings:
    """Images drawn from prompts."""

    prompts: list[str]
    labels: NDArray[np.int64]  # what was asked for
    images: list[Image.Image]


def ask(janus: Janus, held_out: LabelledImages, seed: int) -> Answers:
    """Ask one question about every held-out image, greedily."""
    rng = np.random.default_rng(seed)
    asked = [held_out.sample(i, rng).messages[:1] for i in range(len(held_out))]
    answers: list[str] = []
    for start in range(0, len(asked), AT_ONCE):
        some = [(messages, ()) for messages in asked[start : start + AT_ONCE]]
        answers += janus.chat_batch(some, max_tokens=24)
    questions = [" ".join(s.text for s in m[0].content if isinstance(s, Text)) for m in asked]
    return Answers(questions, answers, [named(one, held_out.names) for one in answers], held_out.labels)


def draw(janus: Janus, held_out: LabelledImages, settings: DrawingConfig, count: int, seed: int) -> Drawings:
    """Draw ``count`` images, the classes in turn, each from a prompt and noise of its own.

    Different prompts share their noise unless they are numbered, and measures of such drawings vary more.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(held_out.names)
    prompts = [held_out.prompt(int(label), rng) for label in labels]
    images = janus.draw(
        prompts,
        batch_size=AT_ONCE,
        guidance=settings.guidance,
        temperature=settings.temperature,
        seed=seed,
        numbers=range(count),
    )
    return Drawings(prompts, labels, images)


Array = NDArray[np.float32]


@dataclass(frozen=True)
class Threshold:
    """How good a figure has to be."""

    name: str
    least: float
    what: str  # in words


THRESHOLDS = (
    Threshold("reading_accuracy", 0.97, "held-out images read correctly"),
    Threshold("drawing_accuracy", 0.97, "drawings recognised as what was asked for"),
    Threshold("drawing_accuracy_t1", 0.95, "the same at temperature 1"),
    Threshold("drawing_accuracy_t1_g1", 0.0, "the same without guidance"),
    Threshold("classifier_accuracy", 0.98, "the judge of the drawings, on held-out images"),
    Threshold("diversity_ratio", 0.6, "how far drawings of a class are apart, against real ones"),
    Threshold("nearest_ratio", 0.9, "distance to the nearest training image, against real ones"),
    Threshold("codes_used", 0.9, "share of the codebook in use on held-out images"),
    Threshold("psnr_db", 21.0, "of held-out images through the image tokenizer"),
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
