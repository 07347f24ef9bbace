"""What builds the batches of a run's steps, whatever they are made of: its samples, read by workers ahead."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from janus_modular.errors import DataError, JanusError, UnsupervisedError
from janus_modular.foreign import printable
from janus_modular.sequence import Sample
from janus_modular.training.bad_samples import METRIC_NAMES, Action, BadSample, SampleError
from janus_modular.training.mixture import Mixture, SampleRef
from janus_modular.training.sample_workers import SampleWorkers, WorkerType
from janus_modular.training.schema import BadSamplesConfig

STEPS_AHEAD = 2
"""Steps that are prepared while another is computed."""

MAX_ATTEMPTS = 100
"""Samples of a source that are tried in place of an unusable sample."""


@dataclass(frozen=True)
class PreparedSample:
    """What a sample became, and the samples that could not be used unchanged in its place."""

    ref: SampleRef  # the attempt that was used
    sequences: list[Any]  # several where a text was split; for other objectives, one example
    bad_samples: list[BadSample]


@dataclass
class StepBatch:
    """The samples of one step, as micro-batches."""

    batches: list[Any]  # the micro-batches that the gradient is accumulated over
    supervised: int  # positions, or examples, that the loss is averaged over
    samples: dict[str, int]  # by source
    tokens: dict[str, int]  # positions, by source; none of examples
    bad_samples: list[BadSample] = field(default_factory=list)

    def bad_sample_counts(self) -> dict[str, float]:
        """Return the metrics ``skipped/SOURCE``, ``cut/SOURCE`` and ``split/SOURCE``."""
        counts: dict[str, float] = {}
        for bad_sample in self.bad_samples:
            name = f"{METRIC_NAMES[bad_sample.action]}/{bad_sample.source}"
            counts[name] = counts.get(name, 0) + 1
        return counts


@dataclass(frozen=True)
class StepBuilder(ABC):
    """Builds the batches of a mixture. Pure: a step has the same batch wherever it is built."""

    mixture: Mixture
    accumulate: int = field(default=1, kw_only=True)  # micro-batches
    rank: int = field(default=0, kw_only=True)  # of this process
    world: int = field(default=1, kw_only=True)  # processes, each of which takes its share of every step
    policy: BadSamplesConfig = field(default_factory=BadSamplesConfig, kw_only=True)

    @abstractmethod
    def read(self, ref: SampleRef, sample: Sample) -> tuple[list[Any], Action | None, str]:
        """Return what a sample becomes, and the action that made it fit, with its reason.

        Raises:
            SampleError: the sample cannot be used.
        """

    @abstractmethod
    def collate(self, prepared: list[PreparedSample]) -> StepBatch:
        """Lay the samples of a step out as micro-batches."""

    @abstractmethod
    def held_out(self, mixture: Mixture, accumulate: int) -> StepBuilder:
        """Return the builder of a mixture of validation, in which nothing is random."""

    @abstractmethod
    def alone(self, example: Any) -> Any:
        """Return a micro-batch of one sequence or example."""

    def prepare(self, ref: SampleRef) -> PreparedSample:
        """Return a sample, ready to be collated; a skipped sample is replaced by another of its source.

        Raises:
            DataError: the sample cannot be used, and the policy does not skip it; names source and index.
            TrainingError: a target image has no stored codes.
        """
        bad_samples: list[BadSample] = []
        for attempt in range(MAX_ATTEMPTS):
            tried = replace(ref, attempt=attempt)
            index = self.mixture.index(tried)
            try:
                examples, action, reason = self.try_sample(tried)
            except SampleError as error:
                bad_samples.append(self.skipped(tried, error))
                continue
            if action:
                bad_samples.append(BadSample(ref.source, index, action, reason))
            return PreparedSample(tried, self.finish(tried, examples), bad_samples)
        raise DataError(
            f"source '{ref.source}': {MAX_ATTEMPTS} samples in a row cannot be used, the last being sample"
            f" {bad_samples[-1].index}: {printable(bad_samples[-1].reason)}"
        )

    def try_sample(self, ref: SampleRef) -> tuple[list[Any], Action | None, str]:
        """Return what `read` makes of a sample.

        Raises:
            SampleError: the sample cannot be used.
        """
        try:
            sample = self.mixture.sample(ref)
        except UnsupervisedError as error:
            raise SampleError("unsupervised", str(error)) from error
        except (JanusError, OSError, UnicodeError) as error:  # from a source that opens files itself
            raise SampleError("unreadable", str(error)) from error
        return self.read(ref, sample)

    def finish(self, ref: SampleRef, examples: list[Any]) -> list[Any]:
        """Return what a sample became, with what only training needs: seeds, stored codes."""
        return examples

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


def count_samples(prepared: Sequence[PreparedSample]) -> dict[str, int]:
    """Return the number of samples of each source."""
    samples: dict[str, int] = {}
    for sample in prepared:
        samples[sample.ref.source] = samples.get(sample.ref.source, 0) + 1
    return samples
