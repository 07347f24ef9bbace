"""Samples that cannot be used unchanged: cutting and splitting, and counting them against the limit."""

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
"""What can be wrong with a sample; each is a key of `BadSamplesConfig`."""

Action = Literal["skip", "cut", "split"]
"""What is done about a bad sample."""

METRIC_NAMES: dict[Action, str] = {"skip": "skipped", "cut": "cut", "split": "split"}
"""The name of each action in metrics and messages."""

MIN_TOLERATED = 10
"""Samples of a source that may be skipped or cut regardless of the limit: a share of few means little."""

MAX_LOGGED = 10
"""Bad samples of each source that are logged; all are counted."""


class SampleError(DataError):
    """A sample that cannot be used, with the reason."""

    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class BadSample:
    """A sample that was not used unchanged."""

    source: str
    index: int
    action: Action
    reason: str

    def __str__(self) -> str:
        """Return a line for logs and previews."""
        return (
            f"{METRIC_NAMES[self.action]} source '{self.source}', sample {self.index}:"
            f" {printable(self.reason)}"
        )


def exceeds_limit(policy: BadSamplesConfig, bad: int, samples: int) -> bool:
    """Return True if more of a source's samples were skipped or cut than ``bad_samples.limit`` allows."""
    return bad > MIN_TOLERATED + policy.limit * samples


def cut(sequence: Sequence, length: int) -> Sequence:
    """Return the first ``length`` positions of a sequence, without an image that the cut would divide.

    The token that the last position would predict lies beyond the cut and is not supervised.
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
    inputs = sequence.inputs_before(end)
    targets = _count_runs(sequence.generation_mask[:end])
    return replace(
        sequence,
        tokens=sequence.tokens[:end],
        labels=labels,
        understanding_mask=sequence.understanding_mask[:end],
        generation_mask=sequence.generation_mask[:end],
        together=None if sequence.together is None else sequence.together[:end],
        hidden=None if sequence.hidden is None else sequence.hidden[:end],
        position_ids=None if sequence.position_ids is None else sequence.position_ids[:, :end],
        understanding_pixels=sequence.understanding_pixels[:inputs],
        understanding_counts=sequence.input_counts[:inputs],
        generation_images=sequence.generation_images[:targets],
        generation_supervised=sequence.generation_supervised[:targets],
    )


def split(sequence: Sequence, length: int) -> list[Sequence]:
    """Return a text as sequences of ``length`` positions and a shorter last one.

    The last position of each still predicts the first token of the next sequence, so every supervised token
    stays supervised once; a last sequence without supervised tokens is left out.
    """
    starts = range(0, len(sequence), length)
    arrays = ("tokens", "labels", "understanding_mask", "generation_mask")
    sections = [
        replace(
            sequence,
            together=None,  # of text, which is causal
            position_ids=None,  # of text, which count from 0 again
            **{name: getattr(sequence, name)[start : start + length] for name in arrays},
        )
        for start in starts
    ]
    return [section for section in sections if (section.labels != IGNORE_INDEX).any()]


def _count_runs(mask: np.ndarray) -> int:
    """Return the number of runs of True: images, which their begin and end tokens separate."""
    return int(np.count_nonzero(np.diff(mask.astype(np.int8), prepend=0) == 1))


@dataclass
class BadSampleCounter:
    """Counts the samples of a run, and the samples that were skipped or cut, against the limit."""

    policy: BadSamplesConfig
    samples: dict[str, int] = field(default_factory=dict)  # used or skipped, by source
    bad: dict[str, int] = field(default_factory=dict)  # skipped or cut, by source
    examples: dict[str, list[BadSample]] = field(default_factory=dict)  # first of this process, by source

    def add(self, samples: Mapping[str, int], bad_samples: list[BadSample]) -> None:
        """Count the samples and bad samples of a step.

        Raises:
            DataError: more samples of a source were skipped or cut than the limit allows; names some.
        """
        for name, count in samples.items():
            self.samples[name] = self.samples.get(name, 0) + count
        for bad_sample in bad_samples:
            self._add_bad(bad_sample)
        for name, bad in self.bad.items():
            if exceeds_limit(self.policy, bad, self.samples.get(name, 0)):
                examples = "\n".join(
                    f"  sample {example.index}: {printable(example.reason)}"
                    for example in self.examples.get(name, ())
                )
                raise DataError(
                    f"source '{name}': {bad:,} of {self.samples[name]:,} samples were skipped or cut, more"
                    f" than {self.policy.limit:g} of them (bad_samples.limit). Among them:\n{examples}\n"
                    "Fix the data, or raise the limit if so many are expected."
                )

    def state(self) -> dict[str, dict[str, int]]:
        """Return the counts, for a checkpoint."""
        return {"samples": dict(self.samples), "bad": dict(self.bad)}

    def load_state(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Continue from counts that `state` returned.

        Raises:
            ValueError: a count is not a whole number from 0: the limit could not be checked.
        """
        samples, bad = dict(state["samples"]), dict(state["bad"])
        for name, count in [*samples.items(), *bad.items()]:
            if type(count) is not int or count < 0:
                raise ValueError(f"{name} has {count!r}, expected a whole number of samples")
        self.samples, self.bad = samples, bad

    def _add_bad(self, bad_sample: BadSample) -> None:
        if bad_sample.action == "skip":  # another sample was used in its place
            self.samples[bad_sample.source] = self.samples.get(bad_sample.source, 0) + 1
        if bad_sample.action != "split":
            self.bad[bad_sample.source] = self.bad.get(bad_sample.source, 0) + 1
        examples = self.examples.setdefault(bad_sample.source, [])
        if len(examples) < MAX_LOGGED and bad_sample not in examples:
            examples.append(bad_sample)
            last = "; further bad samples of this source are only counted"
            log.warning("%s%s", bad_sample, last if len(examples) == MAX_LOGGED else "")
