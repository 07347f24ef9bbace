"""Samples that cannot be used as they are: what is done about them, and how many a run puts up with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from janus_modular.errors import DataError
from janus_modular.foreign import printable
from janus_modular.sequence import IGNORE_INDEX, Sequence
from janus_modular.training.schema import BadSamplesConfig

log = logging.getLogger(__name__)

Problem = Literal["unreadable", "unsupervised", "too_long"]
"""What may be wrong with a sample; a key of `BadSamplesConfig` each."""

COUNTED = {"skip": "skipped", "cut": "cut", "split": "split"}
"""What is done about a sample, and under which name it is counted in the metrics."""

TOLERATED = 10
"""So many samples of a source may be skipped or cut whatever the limit: shares of few samples say little."""

LOGGED = 10
"""Bad samples of each source that are logged; all are counted."""


class SampleError(DataError):
    """A sample that cannot be used, and why."""

    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class BadSample:
    """A sample that was not used as it is."""

    source: str
    index: int
    action: str  # skip, cut or split
    reason: str


def cut(sequence: Sequence, length: int) -> Sequence:
    """Return the first ``length`` positions of a sequence, less an image that would be cut through.

    What the last position would have to predict lies beyond the cut, and is not learned.
    """
    images = sequence.understanding_mask | sequence.generation_mask  # (T,)
    end = min(length, len(sequence))
    if end < len(sequence) and images[end]:
        while images[end - 1]:
            end -= 1
        end -= 1  # begin-of-image
    labels = sequence.labels[:end].copy()
    if end < len(sequence):
        labels[-1:] = IGNORE_INDEX
    reads, draws = _runs(sequence.understanding_mask[:end]), _runs(sequence.generation_mask[:end])
    return replace(
        sequence,
        tokens=sequence.tokens[:end],
        labels=labels,
        understanding_mask=sequence.understanding_mask[:end],
        generation_mask=sequence.generation_mask[:end],
        understanding_pixels=sequence.understanding_pixels[:reads],
        generation_pixels=sequence.generation_pixels[:draws],
        generation_supervised=sequence.generation_supervised[:draws],
    )


def split(sequence: Sequence, length: int) -> list[Sequence]:
    """Return a text as sequences of ``length`` positions and a shorter last one.

    Each last position still predicts the token that the next sequence begins with, so every token that was
    learned is learned once; a last sequence in which nothing is learned is left out.
    """
    starts = range(0, len(sequence), length)
    arrays = ("tokens", "labels", "understanding_mask", "generation_mask")
    pieces = [
        replace(sequence, **{name: getattr(sequence, name)[start : start + length] for name in arrays})
        for start in starts
    ]
    return [piece for piece in pieces if (piece.labels != IGNORE_INDEX).any()]


def _runs(mask: np.ndarray) -> int:
    """Count the stretches of True: images, which their begin and end tokens keep apart."""
    return int(np.count_nonzero(np.diff(mask.astype(np.int8), prepend=0) == 1))


@dataclass
class BadSampleCounter:
    """Counts the samples of a run and those among them that were skipped or cut, against the limit."""

    policy: BadSamplesConfig
    samples: dict[str, int] = field(default_factory=dict)  # by source
    bad: dict[str, int] = field(default_factory=dict)  # by source, skipped or cut
    examples: dict[str, list[BadSample]] = field(default_factory=dict)  # by source, the first of this process

    def add(self, samples: Mapping[str, int], bad_samples: list[BadSample]) -> None:
        """Count a step's samples and faults.

        Raises:
            DataError: more samples of a source were skipped or cut than the limit allows; names some.
        """
        for name, count in samples.items():
            self.samples[name] = self.samples.get(name, 0) + count
        for bad_sample in bad_samples:
            self._note(bad_sample)
        for name, bad in self.bad.items():
            if bad > TOLERATED + self.policy.limit * self.samples.get(name, 0):
                examples = "\n".join(
                    f"  sample {one.index}: {printable(one.reason)}" for one in self.examples.get(name, ())
                )
                raise DataError(
                    f"source '{name}': {bad:,} samples were skipped or cut where {self.samples[name]:,} were"
                    f" taken, more than bad_samples.limit, {self.policy.limit:g}. Among them:\n{examples}\n"
                    "Mend the data, or raise the limit if so many are expected."
                )

    def state(self) -> dict[str, dict[str, int]]:
        """Return the counts, to go on from in a resumed run."""
        return {"samples": dict(self.samples), "bad": dict(self.bad)}

    def load_state(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from counts that `state` returned.

        Raises:
            ValueError: a count is no whole number from 0: the limit could not be held to it.
        """
        samples, bad = dict(state["samples"]), dict(state["bad"])
        for name, count in [*samples.items(), *bad.items()]:
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} has {count!r}, expected a whole number of samples")
        self.samples, self.bad = samples, bad

    def _note(self, bad_sample: BadSample) -> None:
        if bad_sample.action != "split":
            self.bad[bad_sample.source] = self.bad.get(bad_sample.source, 0) + 1
        examples = self.examples.setdefault(bad_sample.source, [])
        if len(examples) < LOGGED and bad_sample not in examples:
            examples.append(bad_sample)
            more = "; further ones of this source are only counted" if len(examples) == LOGGED else ""
            where = f"source '{bad_sample.source}', sample {bad_sample.index}"
            log.warning("%s %s: %s%s", COUNTED[bad_sample.action], where, printable(bad_sample.reason), more)
