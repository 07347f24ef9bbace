"""Runs checks, with or without pytest, and says how each went."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from janus_modular.errors import missing_extra
from janus_modular.registry import MODEL_SLOTS
from janus_modular.testing.check import REGISTERED, Check, NotApplicable

GROUP = "janus_modular.checks"
"""Checks that other packages bring: an entry point a check, ``name = "module:check_name"``."""

Make = Callable[[], tuple[Any, Any]]
"""Returns a component, one that may be spoilt, and an example input."""


@dataclass(frozen=True)
class Result:
    """How a check went."""

    check: str
    outcome: Literal["passed", "failed", "skipped", "expected"]
    seconds: float = 0.0
    note: str = ""  # what is wrong, why it was skipped, or the reason why it may fail


def checks_of(slot: str) -> list[Check]:
    """Return the checks of a slot: our own, then those that installed packages bring; slow ones last."""
    import janus_modular.testing.common_checks
    import janus_modular.testing.sharding
    import janus_modular.testing.slot_checks
    import janus_modular.testing.system_checks  # noqa: F401

    brought = [_brought(point) for point in sorted(entry_points(group=GROUP))]
    every = {check.name: check for check in [*REGISTERED.values(), *brought]}
    return sorted((check for check in every.values() if slot in check.slots), key=lambda check: check.slow)


def run_check(
    check: Check, make: Make, expected_failures: Mapping[str, str] | None = None, *, slot: str | None = None
) -> Result:
    """Make a component of ``slot``, run one check on it, and say how it went; what it raises is the answer.

    A check that is expected to fail (by name, with the reason) and passes has failed: the list is old.
    """
    reason = (expected_failures or {}).get(check.name)
    start = time.perf_counter()
    try:
        check(*make(), slot)
    except NotApplicable as why:
        return Result(check.name, "skipped", time.perf_counter() - start, str(why))
    except Exception as error:
        said = (
            str(error) if type(error).__module__.startswith("janus_") else f"{type(error).__name__}: {error}"
        )
        outcome: Literal["expected", "failed"] = "failed" if reason is None else "expected"
        return Result(check.name, outcome, time.perf_counter() - start, said if reason is None else reason)
    took = time.perf_counter() - start
    if reason is not None:
        return Result(check.name, "failed", took, f"it passes, and was expected to fail: {reason}")
    return Result(check.name, "passed", took)


@cache
def _brought(point: EntryPoint) -> Check:
    """Load a brought check; one whose package is not complete says so when it is run."""
    try:
        function = point.load()
    except Exception as error:
        cure = missing_extra(error, f"'{point.name}'") if isinstance(error, ModuleNotFoundError) else None
        failure = NotApplicable(str(cure)) if cure else error

        def run(component: Any, example: Any) -> None:
            raise failure

        return Check(point.name, run, MODEL_SLOTS)
    return next(check for check in REGISTERED.values() if check.run is function)
