"""Evaluation of a model of named images: what it reads and draws of trained names, and of held-out names.

Each image has a name of its own, so answers are compared with names, and drawings with the images of all
names that are asked for. Each metric has a value by chance: that of answers and drawings that have nothing to
do with the image or the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_modular.janus import Janus
from janus_plugins.demo.evaluation import distances, draw_prompts, first_questions
from janus_plugins.demo.labelled_images import LabelledImages

GRID = 8
"""Drawings are compared as GRID x GRID mean colours: what is where, not how sharp its edges are."""


@dataclass
class NamedResults:
    """Answers to questions about images, and drawings of their names."""

    names: list[str]
    images: list[Image.Image]  # the real ones
    questions: list[str]
    answers: list[str]
    prompts: list[str]
    drawings: list[Image.Image]

    def metrics(self) -> dict[str, float]:
        """Return the metrics, and those by chance under names that begin with ``chance_``."""
        overlaps = np.array([[word_overlap(answer, name) for name in self.names] for answer in self.answers])
        ranks = own_ranks(self.drawings, self.images)
        exact = [_words(a) == _words(name) for a, name in zip(self.answers, self.names, strict=True)]
        count = len(self.names)
        return {
            "read_exactly": float(np.mean(exact)),
            "words_read": float(overlaps.diagonal().mean()),
            "chance_words_read": float(overlaps[~np.eye(count, dtype=bool)].mean()),
            "drawn_nearest": float(np.mean(ranks == 0)),
            "chance_drawn_nearest": 1 / count,
            "drawn_closer": float(1 - ranks.mean() / (count - 1)),
            "chance_drawn_closer": 0.5,
        }


def read_and_draw(
    janus: Janus, source: LabelledImages, settings: Mapping[str, Any], count: int, seed: int
) -> NamedResults:
    """Ask for the names of ``count`` images, spread evenly over a source, and for drawings of their names."""
    indices = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
    rng = np.random.default_rng(seed)
    questions, answers = first_questions(janus, [source.sample(i, rng) for i in indices])
    prompts = [source.prompt(i, rng) for i in indices]
    drawings = draw_prompts(janus, prompts, settings, seed)
    names, images = [source.names[i] for i in indices], [source.images[i] for i in indices]
    return NamedResults(names, images, questions, answers, prompts, drawings)


def word_overlap(answer: str, name: str) -> float:
    """Return the F1 score of the words of an answer against those of a name: 1 if all are the same."""
    predicted, expected = set(_words(answer)), set(_words(name))
    return 2 * len(predicted & expected) / max(1, len(predicted) + len(expected))


def own_ranks(drawings: Sequence[Image.Image], images: Sequence[Image.Image]) -> NDArray[np.int64]:
    """Return for each drawing (N,) how many of the images are nearer than that of its own name."""
    apart = distances(_colours(drawings), _colours(images))  # (N, N)
    return (apart < apart.diagonal()[:, None]).sum(1)


def to_colours(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    """Return images of one size as colour values (N, 3 * pixels) in [0, 1]."""
    return np.stack([np.asarray(image.convert("RGB"), np.float32).ravel() / 255 for image in images])


def _colours(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    return to_colours([image.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX) for image in images])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
