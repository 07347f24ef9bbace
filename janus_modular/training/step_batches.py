"""The tensors of each training step, built from samples that threads or processes prepare ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from janus_modular.errors import DataError, JanusError, UnsupervisedError
from janus_modular.foreign import printable
from janus_modular.model.batch import Batch, collate, pack
from janus_modular.sequence import IGNORE_INDEX, Sample, Sequence
from janus_modular.training.bad_samples import (
    METRIC_NAMES,
    Action,
    BadSample,
    Problem,
    SampleError,
    cut,
    split,
)
from janus_modular.training.image_codes import ImageCodes
from janus_modular.training.mixture import Mixture, SampleRef
from janus_modular.training.processes import Processes
from janus_modular.training.sample_workers import SampleWorkers, WorkerType
from janus_modular.training.schema import BadSamplesConfig

STEPS_AHEAD = 2
"""Steps that are prepared while another is computed."""

MAX_ATTEMPTS = 100
"""Samples of a source that are tried in place of an unusable sample."""


@dataclass(frozen=True)
class PreparedSample:
    """The sequences of a sample, and the samples that could not be used unchanged in its place."""

    ref: SampleRef  # the attempt that was used
    sequences: list[Sequence]  # several where a text was split
    bad_samples: list[BadSample]


@dataclass
class StepBatch:
    """The samples of one step, as micro-batches."""

    batches: list[Batch]  # the micro-batches that the gradient is accumulated over
    supervised: int  # positions that the loss is averaged over
    samples: dict[str, int]  # by source
    tokens: dict[str, int]  # positions, by source
    bad_samples: list[BadSample] = field(default_factory=list)

    def bad_sample_counts(self) -> dict[str, float]:
        """Return the metrics ``skipped/SOURCE``, ``cut/SOURCE`` and ``split/SOURCE``."""
        counts: dict[str, float] = {}
        for bad_sample in self.bad_samples:
            name = f"{METRIC_NAMES[bad_sample.action]}/{bad_sample.source}"
            counts[name] = counts.get(name, 0) + 1
        return counts


def shared(
    batches: Iterator[StepBatch], processes: Processes, *, equal_passes: bool = False
) -> Generator[StepBatch, None, None]:
    """Yield this process's batches, with the counts of the whole step, over all processes.

    With ``equal_passes``, as sharded components need, all processes run as many micro-batches, and in each of
    them the same paths: those that this process has no images for are in ``Batch.idle``.

    Raises:
        OtherRankError: another process cannot build its batch; that process raises the error itself.
    """
    while (batch := processes.together(lambda: next(batches, None))) is not None:
        if equal_passes:
            batch = replace(batch, batches=with_equal_passes(batch.batches, processes))
        counts = processes.gather((batch.supervised, batch.samples, batch.tokens, batch.bad_samples))
        yield replace(
            batch,
            supervised=sum(supervised for supervised, *_ in counts),
            samples=_added(samples for _, samples, *_ in counts),
            tokens=_added(tokens for *_, tokens, _ in counts),
            bad_samples=[bad_sample for *_, bad_samples in counts for bad_sample in bad_samples],
        )


def with_equal_passes(batches: list[Batch], processes: Processes) -> list[Batch]:
    """Return as many micro-batches as any process has, each with the paths that any process runs in it.

    A further micro-batch has one position, and nothing in it is supervised.
    """
    of_ranks = processes.gather([batch.paths for batch in batches])
    count = max(map(len, of_ranks))
    equal = batches + [batches[-1].unsupervised_row()] * (count - len(batches))
    for number, batch in enumerate(equal):
        needed = set().union(*(paths[number] for paths in of_ranks if number < len(paths)))
        equal[number] = replace(batch, idle=frozenset(needed - batch.paths))
    return equal


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum of counts by name."""
    total: dict[str, int] = {}
    for of_rank in counts:
        for name, count in of_rank.items():
            total[name] = total.get(name, 0) + count
    return total


@dataclass(frozen=True)
class BatchBuilder:
    """Builds the batches of a mixture. Pure: a step has the same batch wherever it is built."""

    mixture: Mixture
    sequence: Callable[[Sample, bool], Sequence]  # the processor; the flag says to drop the condition
    image_tokens: int  # positions of a target image
    pad: int  # token id
    length: int | None = None  # of packed rows; None: a row for each sample
    longest: int | None = None  # positions of a row that holds one sample; None: any number
    accumulate: int = 1  # micro-batches
    condition_dropout: float = 0.0
    rank: int = 0  # of this process; each of ``world`` processes takes its share of every step
    world: int = 1
    policy: BadSamplesConfig = field(default_factory=BadSamplesConfig)
    codes: ImageCodes | None = None  # stored codes, in place of target images

    def prepare(self, ref: SampleRef) -> PreparedSample:
        """Return a sample as token ids and pixels; a skipped sample is replaced by another of its source.

        Raises:
            DataError: the sample cannot be used, and the policy does not skip it; names source and index.
            TrainingError: a target image has no stored codes.
        """
        bad_samples: list[BadSample] = []
        for attempt in range(MAX_ATTEMPTS):
            tried = replace(ref, attempt=attempt)
            index = self.mixture.index(tried)
            try:
                sequences, action, reason = self.try_sample(tried)
            except SampleError as error:
                bad_samples.append(self.skipped(tried, error))
                continue
            if action:
                bad_samples.append(BadSample(ref.source, index, action, reason))
            seed = int(self.mixture.rng(tried, purpose=2).integers(2**63))
            sequences = [replace(sequence, seed=seed) for sequence in sequences]
            if self.codes is not None:
                sequences = [self.codes.encode(sequence) for sequence in sequences]
            return PreparedSample(tried, sequences, bad_samples)
        raise DataError(
            f"source '{ref.source}': {MAX_ATTEMPTS} samples in a row cannot be used, the last being sample"
            f" {bad_samples[-1].index}: {printable(bad_samples[-1].reason)}"
        )

    def skipped(self, ref: SampleRef, error: SampleError) -> BadSample:
        """Return the record of a sample that is skipped.

        Raises:
            DataError: the policy does not skip it; names source and index.
        """
        index = self.mixture.index(ref)
        if getattr(self.policy, error.problem) != "skip":
            raise DataError(
                f"source '{ref.source}', sample {index}: {printable(error, most=2000)}"
            ) from error
        return BadSample(ref.source, index, "skip", str(error))

    def collate(self, prepared: list[PreparedSample]) -> StepBatch:
        """Lay the samples of a step out as micro-batches."""
        sequences = [sequence for sample in prepared for sequence in sample.sequences]
        rows = [[sequence] for sequence in sequences] if self.length is None else pack(sequences, self.length)
        row_groups = np.array_split(np.arange(len(rows)), self.accumulate)
        samples: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for sample in prepared:
            samples[sample.ref.source] = samples.get(sample.ref.source, 0) + 1
        for sequence in sequences:
            tokens[sequence.source] = tokens.get(sequence.source, 0) + len(sequence)
        return StepBatch(
            batches=[collate([rows[i] for i in group], pad=self.pad) for group in row_groups if len(group)],
            supervised=sum(map(self.count_supervised, sequences)),
            samples=samples,
            tokens=tokens,
            bad_samples=[bad_sample for sample in prepared for bad_sample in sample.bad_samples],
        )

    def build(self, step: int) -> StepBatch:
        """Build the batch of one step, without threads."""
        return self.collate([self.prepare(ref) for ref in self.sample_refs(step)])

    def build_all(
        self, first: int, last: int, *, workers: int = 0, worker_type: WorkerType = "thread"
    ) -> Generator[StepBatch, None, None]:
        """Yield the batches of the steps from ``first`` to before ``last``; workers prepare samples ahead."""
        if not workers:
            yield from map(self.build, range(first, last))
            return
        waiting: deque[list[Future[PreparedSample]]] = deque()
        with SampleWorkers(self.prepare, workers, worker_type) as pool:
            for step in range(first, last + STEPS_AHEAD):
                if step < last:
                    waiting.append([pool.submit(ref) for ref in self.sample_refs(step)])
                if step >= first + STEPS_AHEAD:
                    yield self.collate([pool.result(future) for future in waiting.popleft()])

    def sample_refs(self, step: int) -> list[SampleRef]:
        """Return this process's samples of a step."""
        return self.mixture.sample_refs(step, rank=self.rank, world=self.world)

    def try_sample(self, ref: SampleRef) -> tuple[list[Sequence], Action | None, str]:
        """Return the sequences of a sample, and the action that made them fit, with its reason.

        Raises:
            SampleError: the sample cannot be used.
        """
        try:
            sample = self.mixture.sample(ref)
        except UnsupervisedError as error:
            raise SampleError("unsupervised", str(error)) from error
        except (JanusError, OSError, UnicodeError) as error:  # from a source that opens files itself
            raise SampleError("unreadable", str(error)) from error
        try:
            sequence = self.sequence(sample, self._drops_condition(ref))
        except JanusError as error:
            # The processor raises a DataError where nothing is supervised.
            problem: Problem = "unsupervised" if isinstance(error, DataError) else "unreadable"
            raise SampleError(problem, str(error)) from error
        sequences, action, reason = self._fit(sample, sequence)
        if not sum(map(self.count_supervised, sequences)):
            after = f" after it was {METRIC_NAMES[action]}" if action else ""
            raise SampleError(
                "unsupervised",
                f"nothing in it is supervised{after}, so that nothing could be learned from it. Expected an"
                " answer, a text to learn or an image to draw.",
            )
        return sequences, action, reason

    def _fit(self, sample: Sample, sequence: Sequence) -> tuple[list[Sequence], Action | None, str]:
        """Return ``sequence`` as it is if a row holds it; otherwise cut or split as the policy says."""
        longest = self.longest if self.length is None else self.length
        if longest is None or len(sequence) <= longest:
            return [sequence], None, ""
        rows = "the context of" if self.length is None else "rows of"
        reason = (
            f"{len(sequence)} positions ({self.count_supervised(sequence)} supervised) do not fit into {rows}"
            f" {longest}"
        )
        if self.policy.too_long == "cut":
            return [cut(sequence, longest)], "cut", reason
        has_images = sequence.understanding_mask.any() or sequence.generation_mask.any()
        if self.policy.too_long == "split" and not sample.template and not has_images:
            return split(sequence, longest), "split", reason
        plain = ", and only plain text can be split" if self.policy.too_long == "split" else ""
        can_grow = self.length is not None and (self.longest is None or self.length < self.longest)
        higher = "raise length, " if can_grow else ""
        raise SampleError(
            "too_long",
            f"{reason}{plain}: {higher}shorten the sample, or set bad_samples.too_long to skip or cut.",
        )

    def _drops_condition(self, ref: SampleRef) -> bool:
        if not self.condition_dropout:
            return False
        return bool(self.mixture.rng(ref, purpose=1).random() < self.condition_dropout)

    def count_supervised(self, sequence: Sequence) -> int:
        """Return the number of supervised positions: of text, and of target images."""
        text_positions = int((sequence.labels != IGNORE_INDEX).sum())
        return text_positions + sum(sequence.generation_supervised) * self.image_tokens
