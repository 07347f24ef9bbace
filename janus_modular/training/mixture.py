"""Which samples a step is made of: counted, not drawn, so that the state is the number of the step.

Sample k of source s is a pure function of the seed. Whatever prepares it (any thread, any machine, a run
that was resumed) gets the same one. numpy only.
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


@dataclass(frozen=True)
class SampleRef:
    """The ``number``-th sample that training takes from a source, or what replaces it."""

    source: str
    number: int
    attempt: int = 0  # how many samples before this one could not be used in its place


def shuffled(index: int, length: int, seed: Sequence[int]) -> int:
    """Return where ``index`` goes in a random order of ``length`` things, without writing that order down.

    A Feistel network permutes 4^n numbers, the least that hold ``length``; a result beyond it goes
    through once more (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _keys(tuple(seed))
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index = left << half | right
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


def count_samples(name: str, source: Source) -> int:
    """Return how many samples an epoch of the source called ``name`` has.

    Raises:
        DataError: the source cannot say.
    """
    try:
        return len(source)
    except JanusError:
        raise
    except Exception as error:  # of a plugin: it may raise anything
        raise DataError(
            f"source '{name}' has no length: {reason(error)}. Expected a whole number from `__len__`."
        ) from error


class Mixture:
    """Sources, mixed at a fixed ratio, of which each step has its part."""

    def __init__(
        self, sources: Mapping[str, Source], phases: Sequence[MixturePhase], batch: int, seed: int
    ) -> None:
        self.sources = sources
        self.seed = seed
        self.batch = batch
        self._phases = phases
        for name, source in sources.items():
            if not count_samples(name, source):
                raise DataError(f"source '{name}' has no samples: expected at least one.")

    def counts(self, step: int) -> dict[str, int]:
        """Return how many samples of each source step ``step`` (from 0) has."""
        before, after = self.taken(step), self.taken(step + 1)
        return {name: after[name] - before[name] for name in after}

    def taken(self, step: int) -> dict[str, int]:
        """Return how many samples of each source come before step ``step``: the whole state of mixing.

        Shares hold over the steps of a phase, not inside each: what a step rounds, a later one makes up for.
        """
        total = taken(self._phases, self.batch, step)
        return {name: total.get(name, 0) for name in self.sources}

    def plan(self, step: int, *, rank: int = 0, world: int = 1) -> list[SampleRef]:
        """Return the samples of a step; of several processes, each takes every ``world``-th."""
        taken, counts = self.taken(step), self.counts(step)
        draws = [
            SampleRef(name, taken[name] + i) for name in self.sources for i in range(counts.get(name, 0))
        ]
        return draws[rank::world]

    def index(self, draw: SampleRef) -> int:
        """Return which sample of its source a draw is: every epoch has an order of its own.

        What replaces a sample that cannot be used is any sample of the source.
        """
        length = len(self.sources[draw.source])
        if draw.attempt:
            return int(self.rng(draw, purpose=1 + draw.attempt).integers(length))
        epoch, place = divmod(draw.number, length)
        return shuffled(place, length, (*self._key(draw.source), epoch))

    def rng(self, draw: SampleRef, purpose: int = 0) -> np.random.Generator:
        """Return the chance that belongs to a draw."""
        return np.random.default_rng((*self._key(draw.source), draw.number, purpose))

    def sample(self, draw: SampleRef) -> Sample:
        """Return a draw's sample, under its source's name.

        Raises:
            JanusError: the sample cannot be read, or is no `Sample` of messages.
            OSError, UnicodeError: of a source that opens files itself.
        """
        index = self.index(draw)
        try:
            sample = self.sources[draw.source].sample(index, self.rng(draw))
        except (JanusError, OSError, UnicodeError):
            raise
        except Exception as error:  # of a plugin: it may raise anything
            raise DataError(f"the source fails: {reason(error)}") from error
        if not isinstance(sample, Sample):
            raise DataError(f"the source returns {type(sample).__name__}; expected a janus_modular.Sample")
        if wrong := [message for message in sample.messages if not isinstance(message, Message)]:
            raise DataError(
                f"the source returns a Sample of {type(wrong[0]).__name__}; expected messages: each a"
                " janus_modular.Message"
            )
        return replace(sample, source=draw.source)

    def _key(self, source: str) -> tuple[int, int]:
        return self.seed, crc32(source.encode())


HALF = Fraction(1, 2)


@dataclass(frozen=True)
class MixturePhase:
    """A mixture that holds up to a step."""

    shares: dict[str, float]  # by source name
    until: int | None = None  # first step of the next phase; None: to the end


def apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Return how many of the first ``total`` samples come from each source.

    The k-th sample (from 0) of a source with share p is due at (k + 1/2) / p, and samples are taken in the
    order in which they are due; of those due at once, the source named first goes first (Webster's method;
    Balinski and Young, "Fair Representation", 1982). So counts never fall as ``total`` grows, are exact
    wherever the shares allow it, and a small share has its turn as well.
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


def taken(phases: Sequence[MixturePhase], batch: int, step: int) -> dict[str, int]:
    """Return how many samples of each source the steps before ``step`` take, ``batch`` a step."""
    total: dict[str, int] = {}
    start = 0
    for phase in phases:
        end = step if phase.until is None else min(step, phase.until)
        for name, count in apportion(phase.shares, batch * max(0, end - start)).items():
            total[name] = total.get(name, 0) + count
        start = max(start, end)
    return total
