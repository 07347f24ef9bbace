"""The mixture of sources: which samples each step has, as a pure function of seed and step. No torch.

Sample k of a source depends on the seed alone. Any thread, machine or resumed run
prepares the same sample, so the number of the step is the whole state of the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from zlib import crc32

import numpy as np

from janus_modular.errors import DataError, JanusError
from janus_modular.foreign import reason
from janus_modular.protocols import Source
from janus_modular.sequence import Message, Sample

HALF = Fraction(1, 2)


@dataclass(frozen=True)
class SampleRef:
    """The ``number``-th sample that training takes from a source, or its replacement."""

    source: str
    number: int
    attempt: int = 0  # number of unusable samples that were tried in this place before


@dataclass(frozen=True)
class MixturePhase:
    """Shares of the sources up to a step."""

    shares: dict[str, float]  # by source name
    until: int | None = None  # first step of the next phase; None: to the end


class Mixture:
    """Sources, mixed at a fixed ratio in each phase."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        phases: Sequence[MixturePhase],
        batch: int,
        seed: int,
        variants: int | None = None,
    ) -> None:
        """Mix ``batch`` samples a step; each sample has ``variants`` random versions, None: ever new ones."""
        self.sources = sources
        self.seed = seed
        self.batch = batch
        self.variants = variants
        self._phases = phases
        for name, source in sources.items():
            if not count_samples(name, source):
                raise DataError(f"source '{name}' has no samples: expected at least one.")

    def counts(self, step: int) -> dict[str, int]:
        """Return the number of samples of each source in step ``step`` (from 0)."""
        before, after = self.samples_before(step), self.samples_before(step + 1)
        return {name: after[name] - before[name] for name in after}

    def samples_before(self, step: int) -> dict[str, int]:
        """Return the number of samples of each source before step ``step``: the whole state of the mixture.

        Shares hold over the steps of a phase, not in each step: later steps make up for rounding.
        """
        total = samples_before(self._phases, self.batch, step)
        return {name: total.get(name, 0) for name in self.sources}

    def sample_refs(self, step: int, *, rank: int = 0, world: int = 1) -> list[SampleRef]:
        """Return the samples of a step; of ``world`` processes, each takes every ``world``-th sample."""
        first, counts = self.samples_before(step), self.counts(step)
        refs = [SampleRef(name, first[name] + i) for name in self.sources for i in range(counts.get(name, 0))]
        return refs[rank::world]

    def index(self, ref: SampleRef) -> int:
        """Return the index of a sample in its source: every epoch has an order of its own.

        The replacement of an unusable sample is any sample of the source.
        """
        length = len(self.sources[ref.source])
        if ref.attempt:
            return int(self.rng(ref, purpose=1 + ref.attempt).integers(length))
        epoch, position = divmod(ref.number, length)
        return shuffled(position, length, (*self._seed(ref.source), epoch))

    def rng(self, ref: SampleRef, purpose: int = 0) -> np.random.Generator:
        """Return the random generator of a sample; each ``purpose`` has a generator of its own."""
        return np.random.default_rng((*self._seed(ref.source), ref.number, purpose))

    def sample_rng(self, ref: SampleRef) -> np.random.Generator:
        """Return the generator that a source gets, for augmentation and for the choice of captions.

        With ``variants``, version 0 of every sample comes in the first epoch, version 1 in the second, and so
        on, and then version 0 again.
        """
        if self.variants is None:
            return self.rng(ref)
        variant = ref.number // len(self.sources[ref.source]) % self.variants
        return np.random.default_rng((*self._seed(ref.source), self.index(ref), variant, 0))

    def sample(self, ref: SampleRef) -> Sample:
        """Return a sample, with the name of its source.

        Raises:
            JanusError: the sample cannot be read, or is not a `Sample` of messages.
            OSError, UnicodeError: from a source that opens files itself.
        """
        index = self.index(ref)
        try:
            sample = self.sources[ref.source].sample(index, self.sample_rng(ref))
        except (JanusError, OSError, UnicodeError):
            raise
        except Exception as error:  # a third-party source may raise anything
            raise DataError(f"the source fails: {reason(error)}") from error
        if not isinstance(sample, Sample):
            raise DataError(f"the source returns {type(sample).__name__}; expected a janus_modular.Sample")
        if wrong := [message for message in sample.messages if not isinstance(message, Message)]:
            raise DataError(
                f"the source returns a Sample of {type(wrong[0]).__name__}; expected messages: each a"
                " janus_modular.Message"
            )
        return replace(sample, source=ref.source)

    def _seed(self, source: str) -> tuple[int, int]:
        return self.seed, crc32(source.encode())


def count_samples(name: str, source: Source) -> int:
    """Return the number of samples in an epoch of the source called ``name``.

    Raises:
        DataError: the source has no length.
    """
    try:
        return len(source)
    except JanusError:
        raise
    except Exception as error:  # a third-party source may raise anything
        raise DataError(
            f"source '{name}' has no length: {reason(error)}. Expected a whole number from `__len__`."
        ) from error


def apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Return how many of the first ``total`` samples come from each source.

    The k-th sample (from 0) of a source with share p is due at (k + 1/2) / p, and samples are taken in the
    order in which they are due; of samples that are due at once, the source named first goes first (Webster's
    method; Balinski and Young, "Fair Representation", 1982). So counts never fall as ``total`` grows, are
    exact wherever the shares allow it, and a small share has its turn as well.
    """
    exact = {name: Fraction(repr(share)) for name, share in shares.items() if share}
    whole = sum(exact.values())
    counts = {name: int(total * share / whole + HALF) for name, share in exact.items()}
    while (missing := total - sum(counts.values())) > 0:
        counts[min(exact, key=lambda name: (counts[name] + HALF) / exact[name])] += 1
    for _ in range(-missing):
        last = {name: (counts[name] - HALF) / exact[name] for name in reversed(exact)}
        counts[max(last, key=lambda name: last[name])] -= 1
    return {name: counts.get(name, 0) for name in shares}


def samples_before(phases: Sequence[MixturePhase], batch: int, step: int) -> dict[str, int]:
    """Return the number of samples of each source in all steps before ``step``, ``batch`` samples a step."""
    total: dict[str, int] = {}
    start = 0
    for phase in phases:
        end = step if phase.until is None else min(step, phase.until)
        for name, count in apportion(phase.shares, batch * max(0, end - start)).items():
            total[name] = total.get(name, 0) + count
        start = max(start, end)
    return total


def shuffled(index: int, length: int, seed: Sequence[int]) -> int:
    """Return the position of ``index`` in a random permutation of ``length`` numbers, without storing it.

    A Feistel network permutes 4^n numbers, the smallest such set that holds ``length``; a result beyond
    ``length`` is permuted again (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _keys(tuple(seed))
    while True:
        high, low = index >> half, index & mask
        for key in keys:
            high, low = low, high ^ (_mix(low ^ key) & mask)
        index = high << half | low
        if index < length:
            return index


@lru_cache(maxsize=64)
def _keys(seed: tuple[int, ...]) -> list[int]:
    return [int(key) for key in np.random.SeedSequence(list(seed)).generate_state(4, np.uint64)]


def _mix(x: int) -> int:
    """Scramble 64 bits (the finaliser of splitmix64)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31
