"""From samples to tensors: what one step works on, prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from janus_modular.errors import DataError, JanusError
from janus_modular.foreign import printable
from janus_modular.model.batch import Batch, collate, pack
from janus_modular.sequence import IGNORE_INDEX, Sample, Sequence
from janus_modular.training.bad_samples import COUNTED, BadSample, Problem, SampleError, cut, split
from janus_modular.training.mixture import Mixture, SampleRef
from janus_modular.training.schema import BadSamplesConfig

AHEAD = 2
"""Steps that are prepared while one is computed."""

ATTEMPTS = 100
"""Samples of a source that are tried in place of one that cannot be used."""


@dataclass(frozen=True)
class PreparedSample:
    """What became of a draw: sequences, and the samples that could not be used as they are."""

    draw: SampleRef  # the attempt that was used
    sequences: list[Sequence]  # one, or several where a text was split
    bad_samples: list[BadSample]


@dataclass
class StepBatch:
    """One step's samples."""

    batches: list[Batch]  # one, or as many as the step is accumulated from
    supervised: int  # positions that the step's loss is the mean of
    samples: dict[str, int]  # by source
    tokens: dict[str, int]  # positions, by source
    bad_samples: list[BadSample] = field(default_factory=list)

    def bad_sample_counts(self) -> dict[str, float]:
        """Count the faults as metrics: ``skipped/SOURCE``, ``cut/SOURCE``, ``split/SOURCE``."""
        counts: dict[str, float] = {}
        for bad_sample in self.bad_samples:
            name = f"{COUNTED[bad_sample.action]}/{bad_sample.source}"
            counts[name] = counts.get(name, 0) + 1
        return counts


@dataclass(frozen=True)
class BatchBuilder:
    """Makes work of a mixture. Pure: the same step gives the same work, whoever prepares it."""

    mixture: Mixture
    sequence: Callable[[Sample, bool], Sequence]  # the processor: a sample, and whether to drop the condition
    image_tokens: int  # positions of a drawn image
    pad: int  # token id
    length: int | None = None  # of packed rows; None: a row a sample
    longest: int | None = None  # positions that a row a sample may have; None: any number
    accumulate: int = 1
    condition_dropout: float = 0.0
    rank: int = 0  # of several processes, which one this is; each takes its share of every step
    world: int = 1
    policy: BadSamplesConfig = field(default_factory=BadSamplesConfig)

    def prepare(self, draw: SampleRef) -> PreparedSample:
        """Return a draw as token ids and pixels; what is skipped is replaced by another of its source.

        Raises:
            DataError: the sample cannot be used, and the policy is not to skip it; says its source and index.
        """
        bad_samples: list[BadSample] = []
        for attempt in range(ATTEMPTS):
            tried = replace(draw, attempt=attempt)
            try:
                sequences, action, reason = self._sequences(tried)
            except SampleError as error:
                index = self.mixture.index(tried)
                if getattr(self.policy, error.problem) != "skip":
                    raise DataError(
                        f"source '{draw.source}', sample {index}: {printable(error, most=2000)}"
                    ) from error
                bad_samples.append(BadSample(draw.source, index, "skip", str(error)))
                continue
            if action:
                bad_samples.append(BadSample(draw.source, self.mixture.index(tried), action, reason))
            seed = int(self.mixture.rng(tried, purpose=2).integers(2**63))
            sequences = [replace(sequence, seed=seed) for sequence in sequences]
            return PreparedSample(tried, sequences, bad_samples)
        raise DataError(
            f"source '{draw.source}': {ATTEMPTS} samples in a row cannot be used, the last being sample"
            f" {bad_samples[-1].index}: {printable(bad_samples[-1].reason)}"
        )

    def work(self, prepared: list[PreparedSample]) -> StepBatch:
        """Lay out a step's sequences as batches."""
        sequences = [sequence for one in prepared for sequence in one.sequences]
        rows = [[one] for one in sequences] if self.length is None else pack(sequences, self.length)
        pieces = [piece for piece in np.array_split(np.arange(len(rows)), self.accumulate) if len(piece)]
        samples: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for made in prepared:
            samples[made.draw.source] = samples.get(made.draw.source, 0) + 1
        for one in sequences:
            tokens[one.source] = tokens.get(one.source, 0) + len(one)
        return StepBatch(
            batches=[collate([rows[i] for i in piece], pad=self.pad) for piece in pieces],
            supervised=sum(map(self._supervised, sequences)),
            samples=samples,
            tokens=tokens,
            bad_samples=[bad_sample for made in prepared for bad_sample in made.bad_samples],
        )

    def step(self, number: int) -> StepBatch:
        """Prepare one step, here and now."""
        return self.work([self.prepare(draw) for draw in self._plan(number)])

    def steps(self, first: int, last: int, *, workers: int = 0) -> Generator[StepBatch, None, None]:
        """Yield the work of steps ``first`` to before ``last``, samples prepared ahead by threads."""
        if not workers:
            yield from map(self.step, range(first, last))
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="samples")
        waiting: deque[list[Future[PreparedSample]]] = deque()
        try:
            for number in range(first, last + AHEAD):
                if number < last:
                    waiting.append([pool.submit(self.prepare, draw) for draw in self._plan(number)])
                if number >= first + AHEAD:
                    yield self.work([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, number: int) -> list[SampleRef]:
        return self.mixture.plan(number, rank=self.rank, world=self.world)

    def _sequences(self, draw: SampleRef) -> tuple[list[Sequence], str, str]:
        """Return a draw's sequences, and what was done to make them fit, with the reason.

        Raises:
            SampleError: the sample cannot be used; says what kind of fault it is.
        """
        try:
            sample = self.mixture.sample(draw)
        except (JanusError, OSError, UnicodeError) as error:  # of a source that opens files itself
            raise SampleError("unreadable", str(error)) from error
        try:
            sequence = self.sequence(sample, self._drops(draw))
        except JanusError as error:
            # Of a processor's errors, DataError is that nothing is learned.
            problem: Problem = "unsupervised" if isinstance(error, DataError) else "unreadable"
            raise SampleError(problem, str(error)) from error
        sequences, action, reason = self._fitted(sample, sequence)
        if not sum(map(self._supervised, sequences)):
            after = f" after it was {COUNTED[action]}" if action else ""
            raise SampleError(
                "unsupervised",
                f"nothing in it is supervised{after}, so that nothing could be learned from it. Expected an"
                " answer, a text to learn or an image to draw.",
            )
        return sequences, action, reason

    def _fitted(self, sample: Sample, sequence: Sequence) -> tuple[list[Sequence], str, str]:
        longest = self.longest if self.length is None else self.length
        if longest is None or len(sequence) <= longest:
            return [sequence], "", ""
        rows = "the context of" if self.length is None else "rows of"
        reason = (
            f"{len(sequence)} positions ({self._supervised(sequence)} supervised) do not fit into {rows}"
            f" {longest}"
        )
        if self.policy.too_long == "cut":
            return [cut(sequence, longest)], "cut", reason
        images = sequence.understanding_mask.any() or sequence.generation_mask.any()
        if self.policy.too_long == "split" and not sample.template and not images:
            return split(sequence, longest), "split", reason
        plain = ", and only plain text can be split" if self.policy.too_long == "split" else ""
        higher = "" if self.length is None else "raise length, "
        raise SampleError(
            "too_long",
            f"{reason}{plain}: {higher}shorten the sample, or set bad_samples.too_long to skip or cut.",
        )

    def _drops(self, draw: SampleRef) -> bool:
        if not self.condition_dropout:
            return False
        return bool(self.mixture.rng(draw, purpose=1).random() < self.condition_dropout)

    def _supervised(self, sequence: Sequence) -> int:
        words = int((sequence.labels != IGNORE_INDEX).sum())
        return words + sum(sequence.generation_supervised) * self.image_tokens
