"""Evaluation of the trained model on held-out images: answers, drawings, and metrics with their thresholds.

All distances are between pixels in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from janus_modular.interfaces import ImageAutoencoder, ImageTokenizer
from janus_modular.janus import Janus
from janus_modular.sequence import Sample, Text
from janus_plugins.demo.labelled_images import LabelledImages, to_pixels
from janus_plugins.demo.networks import Classifier

BATCH_SIZE = 100
MAX_TOKENS = 80  # of an answer; the longest name has 78 bytes

Array = NDArray[np.float32]


@dataclass
class Answers:
    """One question about each held-out image, with the model's answer."""

    questions: list[str]
    answers: list[str]
    predicted: list[int | None]  # the class that an answer names
    labels: NDArray[np.int64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Return for each answer whether it is right; an answer that names no class, or two, is wrong."""
        return np.array([p == label for p, label in zip(self.predicted, self.labels, strict=True)])

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return float(np.mean(self.correct))


@dataclass
class Drawings:
    """Images drawn from prompts."""

    prompts: list[str]
    labels: NDArray[np.int64]  # the requested classes
    images: list[Image.Image]

    def of_class(self, label: int) -> list[Image.Image]:
        """Return the drawings of one class."""
        return [image for image, own in zip(self.images, self.labels, strict=True) if own == label]


def ask(janus: Janus, held_out: LabelledImages, seed: int) -> Answers:
    """Ask one question about every held-out image; answers are decoded greedily."""
    rng = np.random.default_rng(seed)
    questions, answers = first_questions(janus, [held_out.sample(i, rng) for i in range(len(held_out))])
    predicted = [named_class(answer, held_out.names) for answer in answers]
    return Answers(questions, answers, predicted, held_out.labels)


def first_questions(janus: Janus, samples: Sequence[Sample]) -> tuple[list[str], list[str]]:
    """Return the text of each sample's first message, and the model's answer to the message."""
    prompts = [sample.messages[:1] for sample in samples]
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = [(messages, ()) for messages in prompts[start : start + BATCH_SIZE]]
        answers += janus.chat_batch(batch, max_tokens=MAX_TOKENS)
    questions = [
        " ".join(segment.text for segment in messages[0].content if isinstance(segment, Text))
        for messages in prompts
    ]
    return questions, answers


def draw(
    janus: Janus, held_out: LabelledImages, settings: Mapping[str, Any], count: int, seed: int
) -> Drawings:
    """Draw ``count`` images, of the classes in turn, each from a prompt and noise of its own."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(held_out.names)
    prompts = [held_out.prompt(int(label), rng) for label in labels]
    return Drawings(prompts, labels, draw_prompts(janus, prompts, settings, seed))


def draw_prompts(
    janus: Janus, prompts: Sequence[str], settings: Mapping[str, Any], seed: int
) -> list[Image.Image]:
    """Draw an image of each prompt, each from noise of its own.

    Without numbers, different prompts share their noise, and metrics of such drawings vary more.
    """
    return janus.draw(prompts, batch_size=BATCH_SIZE, **settings, seed=seed, numbers=range(len(prompts)))


@torch.inference_mode()
def reconstruct(janus: Janus, held_out: LabelledImages) -> tuple[list[Image.Image], dict[str, float]]:
    """Encode and decode images with the model's image tokenizer or autoencoder.

    Returns the images, and for a tokenizer the metric ``codes_used``.
    """
    [path] = janus.model.generation.frozen_submodules
    module = cast("ImageTokenizer | ImageAutoencoder", janus.model.get_submodule(f"generation.{path}"))
    low, high = module.value_range
    pixels = to_pixels(held_out.images)
    encoded = module.encode(low + pixels / 255 * (high - low))
    height, width = pixels.shape[-2:]
    decoded = module.decode(encoded, height=height, width=width)
    reconstructed = ((decoded - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
    images = [Image.fromarray(image) for image in reconstructed.permute(0, 2, 3, 1).numpy()]
    if encoded.is_floating_point():
        return images, {}
    return images, {"codes_used": len(encoded.unique()) / max(cast(ImageTokenizer, module).codebooks)}


def recognised(classifier: Classifier, drawings: Drawings) -> float:
    """Return the share of drawings in which the classifier sees the requested class."""
    return float(np.mean(classifier.classify(drawings.images).numpy() == drawings.labels))


def variety(drawings: Drawings, train: LabelledImages, held_out: LabelledImages) -> dict[str, float]:
    """Return metrics of drawings relative to held-out images: diversity, distance to the training images."""
    drawn, real, known = (to_grey(source.images) for source in (drawings, held_out, train))
    return {
        "diversity_ratio": diversity(drawn, drawings.labels) / diversity(real, held_out.labels),
        "nearest_ratio": nearest_distance(drawn, known) / nearest_distance(real, known),
    }


def to_grey(images: Sequence[Image.Image]) -> Array:
    """Return images of one size as grey values (N, pixels) in [0, 1]."""
    return np.stack([np.asarray(image.convert("L"), np.float32).ravel() for image in images]) / np.float32(
        255
    )


def distances(a: Array, b: Array) -> Array:
    """Return the Euclidean distances (N, M) of rows (N, D) and (M, D)."""
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(square, 0))


def diversity(images: Array, labels: NDArray[np.int64]) -> float:
    """Return the mean distance of two different images of a class, averaged over the classes."""
    means = []
    for label in np.unique(labels):
        same_class = images[labels == label]
        n = len(same_class)
        means.append(distances(same_class, same_class).sum() / (n * (n - 1)))
    return float(np.mean(means))


def nearest_distance(images: Array, known: Array) -> float:
    """Return the mean distance to the nearest of the images ``known``."""
    return float(distances(images, known).min(1).mean())


def psnr(images: Array, reconstructed: Array) -> float:
    """Return the peak signal-to-noise ratio in dB, for a peak of 1, averaged over images."""
    return float((-10 * np.log10(((images - reconstructed) ** 2).mean(1))).mean())


def named_class(answer: str, names: Sequence[str]) -> int | None:
    """Return the index of the name that an answer holds; None if it holds no name, or several."""
    matches = [i for i, name in enumerate(names) if re.search(rf"\b{re.escape(name)}\b", answer.lower())]
    return matches[0] if len(matches) == 1 else None


def confusion(labels: NDArray[np.int64], predicted: Sequence[int | None], classes: int) -> NDArray[np.int64]:
    """Return counts (classes, classes + 1) of labels and predictions; the last column: no prediction."""
    table = np.zeros((classes, classes + 1), np.int64)
    for label, prediction in zip(labels, predicted, strict=True):
        table[label, classes if prediction is None else prediction] += 1
    return table
