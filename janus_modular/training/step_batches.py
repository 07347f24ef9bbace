"""The batches of token sequences that training steps take, and what several processes have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from janus_modular.errors import DataError, JanusError
from janus_modular.model.batch import Batch, collate, pack
from janus_modular.sequence import IGNORE_INDEX, Sample, Sequence
from janus_modular.training.bad_samples import METRIC_NAMES, Action, Problem, SampleError, cut, split
from janus_modular.training.image_codes import ImageCodes
from janus_modular.training.mixture import Mixture, SampleRef
from janus_modular.training.processes import Processes
from janus_modular.training.step_builder import PreparedSample, StepBatch, StepBuilder, count_samples


def shared(
    batches: Iterator[StepBatch], processes: Processes, *, equal_passes: bool = False
) -> Generator[StepBatch, None, None]:
    """Yield this process's batches, with the counts of the whole step, over all processes.

    With ``equal_passes``, as sharded components need, all processes run as many micro-batches, and in each of
    them the same paths as often: what this process has no images for is in ``Batch.idle``.

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
    """Return as many micro-batches as any process has, each with the runs of paths that any has in it.

    A further micro-batch has one position, and nothing in it is supervised.
    """
    of_ranks = processes.gather([batch.runs for batch in batches])
    count = max(map(len, of_ranks))
    equal = batches + [batches[-1].unsupervised_row()] * (count - len(batches))
    for number, batch in enumerate(equal):
        needed = Counter[str]()
        for runs in of_ranks:
            needed |= Counter(runs[number] if number < len(runs) else {})  # the larger count of each
        equal[number] = replace(batch, idle=dict(needed - Counter(batch.runs)))
    return equal


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum of counts by name."""
    total: dict[str, int] = {}
    for of_rank in counts:
        for name, count in of_rank.items():
            total[name] = total.get(name, 0) + count
    return total


@dataclass(frozen=True)
class BatchBuilder(StepBuilder):
    """Builds batches of token sequences, which the processor makes of samples."""

    sequence: Callable[[Sample, bool], Sequence]  # the processor; the flag says to drop the condition
    image_tokens: int  # positions of a target image
    pad: int  # token id
    length: int | None = None  # of packed rows; None: a row for each sample
    longest: int | None = None  # positions of a row that holds one sample; None: any number
    condition_dropout: float = 0.0
    codes: ImageCodes | None = None  # stored codes, in place of target images

    def finish(self, ref: SampleRef, examples: list[Any]) -> list[Sequence]:
        """Return sequences with their seeds, and with stored codes in place of target images.

        Raises:
            TrainingError: a target image has no stored codes.
        """
        seed = int(self.mixture.rng(ref, purpose=2).integers(2**63))
        sequences = [replace(sequence, seed=seed) for sequence in examples]
        return sequences if self.codes is None else [self.codes.encode(sequence) for sequence in sequences]

    def collate(self, prepared: list[PreparedSample]) -> StepBatch:
        """Lay the samples of a step out as micro-batches."""
        sequences = [sequence for sample in prepared for sequence in sample.sequences]
        rows = [[sequence] for sequence in sequences] if self.length is None else pack(sequences, self.length)
        row_groups = np.array_split(np.arange(len(rows)), self.accumulate)
        tokens: dict[str, int] = {}
        for sequence in sequences:
            tokens[sequence.source] = tokens.get(sequence.source, 0) + len(sequence)
        return StepBatch(
            batches=[collate([rows[i] for i in group], pad=self.pad) for group in row_groups if len(group)],
            supervised=sum(map(self.count_supervised, sequences)),
            samples=count_samples(prepared),
            tokens=tokens,
            bad_samples=[bad_sample for sample in prepared for bad_sample in sample.bad_samples],
        )

    def held_out(self, mixture: Mixture, accumulate: int) -> BatchBuilder:
        """Return the builder of a mixture of validation: no condition is dropped, and images are encoded."""
        return BatchBuilder(
            mixture=mixture,
            sequence=lambda sample, _: self.sequence(sample, False),
            image_tokens=self.image_tokens,
            pad=self.pad,
            length=self.length,
            longest=self.longest,
            accumulate=accumulate,
            rank=self.rank,
            world=self.world,
            policy=self.policy,
        )

    def alone(self, example: Any) -> Batch:
        """Return a micro-batch of one sequence."""
        return collate([example])

    def read(self, ref: SampleRef, sample: Sample) -> tuple[list[Sequence], Action | None, str]:
        """Return the sequences of a sample, and the action that made them fit, with its reason.

        Raises:
            SampleError: the sample cannot be used.
        """
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
