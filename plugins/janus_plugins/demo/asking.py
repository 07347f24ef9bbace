"""Asks a trained model about held-out images and lets it draw, through the API that everybody uses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_modular.janus import Janus
from janus_modular.sequence import Text
from janus_plugins.demo.images import LabelledImages
from janus_plugins.demo.measures import named
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
