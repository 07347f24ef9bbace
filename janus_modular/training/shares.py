"""How many samples each source of a mixture gives: whole numbers, exact over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Phase:
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


def taken(phases: Sequence[Phase], batch: int, step: int) -> dict[str, int]:
    """Return how many samples of each source the steps before ``step`` take, ``batch`` a step."""
    total: dict[str, int] = {}
    start = 0
    for phase in phases:
        end = step if phase.until is None else min(step, phase.until)
        for name, count in apportion(phase.shares, batch * max(0, end - start)).items():
            total[name] = total.get(name, 0) + count
        start = max(start, end)
    return total
