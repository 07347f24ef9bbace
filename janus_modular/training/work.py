"""From samples to tensors: what one step works on, prepared ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from janus_modular.batch import Batch, collate, pack
from janus_modular.errors import DataError, JanusError
from janus_modular.sequence import IGNORED, Sample, Sequence
from janus_modular.training.mixture import Draw, Mixture

AHEAD = 2
"""Steps that are prepared while one is computed."""


@dataclass
class Work:
    """One step's samples."""

    batches: list[Batch]  # one, or as many as the step is accumulated from
    supervised: int  # positions that the step's loss is the mean of
    samples: dict[str, int]  # by source
    tokens: dict[str, int]  # positions, by source


@dataclass(frozen=True)
class Preparation:
    """Makes work of a mixture. Pure: the same step gives the same work, whoever prepares it."""

    mixture: Mixture
    sequence: Callable[[Sample, bool], Sequence]  # the processor: a sample, and whether to drop the condition
    picture_tokens: int  # positions of a drawn picture
    pad: int  # token id
    length: int | None = None  # of packed rows; None: a row a sample
    accumulate: int = 1
    drop_condition: float = 0.0
    rank: int = 0  # of several processes, which one this is; each takes its share of every step
    world: int = 1

    def one(self, draw: Draw) -> Sequence:
        """Return a draw as token ids and pixels.

        Raises:
            DataError: the sample cannot be used; says its source and index.
        """
        sample = self.mixture.sample(draw)
        try:
            sequence = self.sequence(sample, self._drops(draw))
            if not (supervised := self._supervised(sequence)):
                raise DataError(
                    "nothing in it is supervised, so that nothing could be learned from it. Expected an"
                    " answer, a text to learn or a picture to draw."
                )
            if self.length is not None and len(sequence) > self.length:
                raise DataError(
                    f"{len(sequence)} positions ({supervised} supervised) do not fit into rows of"
                    f" {self.length}: raise length, or shorten the sample."
                )
        except JanusError as error:
            raise DataError(f"source '{draw.source}', sample {self.mixture.index(draw)}: {error}") from error
        return sequence

    def work(self, sequences: list[Sequence]) -> Work:
        """Lay out a step's sequences as batches."""
        rows = [[one] for one in sequences] if self.length is None else pack(sequences, self.length)
        pieces = [piece for piece in np.array_split(np.arange(len(rows)), self.accumulate) if len(piece)]
        samples: dict[str, int] = {}
        tokens: dict[str, int] = {}
        for one in sequences:
            samples[one.source] = samples.get(one.source, 0) + 1
            tokens[one.source] = tokens.get(one.source, 0) + len(one)
        return Work(
            batches=[collate([rows[i] for i in piece], pad=self.pad) for piece in pieces],
            supervised=sum(map(self._supervised, sequences)),
            samples=samples,
            tokens=tokens,
        )

    def step(self, number: int) -> Work:
        """Prepare one step, here and now."""
        return self.work([self.one(draw) for draw in self._plan(number)])

    def steps(self, first: int, last: int, *, workers: int = 0) -> Generator[Work, None, None]:
        """Yield the work of steps ``first`` to before ``last``, samples prepared ahead by threads."""
        if not workers:
            yield from map(self.step, range(first, last))
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="samples")
        waiting: deque[list[Future[Sequence]]] = deque()
        try:
            for number in range(first, last + AHEAD):
                if number < last:
                    waiting.append([pool.submit(self.one, draw) for draw in self._plan(number)])
                if number >= first + AHEAD:
                    yield self.work([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, number: int) -> list[Draw]:
        return self.mixture.plan(number, rank=self.rank, world=self.world)

    def _drops(self, draw: Draw) -> bool:
        if not self.drop_condition:
            return False
        return bool(self.mixture.rng(draw, purpose=1).random() < self.drop_condition)

    def _supervised(self, sequence: Sequence) -> int:
        words = int((sequence.labels != IGNORED).sum())
        return words + sum(sequence.generation_supervised) * self.picture_tokens
