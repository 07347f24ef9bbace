"""Collects the checks of a slot and runs them, with or without pytest."""

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
"""The entry points of other packages' checks: ``name = "module:check_name"``."""

Make = Callable[[], tuple[Any, Any]]
"""Returns a component, which a check may change, and an example input."""


@dataclass(frozen=True)
class Result:
    """The result of a check."""

    check: str
    outcome: Literal["passed", "failed", "skipped", "expected"]
    seconds: float = 0.0
    note: str = ""  # the error, or the reason why it was skipped or is expected to fail


def checks_of(slot: str) -> list[Check]:
    """Return the checks of a slot: our own, then those of installed packages; slow checks last."""
    import janus_modular.testing.common_checks
    import janus_modular.testing.objective_checks
    import janus_modular.testing.scheduler_checks
    import janus_modular.testing.session_checks
    import janus_modular.testing.sharding
    import janus_modular.testing.slot_checks
    import janus_modular.testing.cache_checks  # isort: skip
    import janus_modular.testing.system_checks  # noqa: F401

    external = [_load(point) for point in sorted(entry_points(group=GROUP))]
    checks = {check.name: check for check in [*REGISTERED.values(), *external]}
    return sorted((check for check in checks.values() if slot in check.slots), key=lambda check: check.slow)


def run_check(
    check: Check, make: Make, expected_failures: Mapping[str, str] | None = None, *, slot: str | None = None
) -> Result:
    """Run a check on a new component of ``slot``; an error of the check is in the result and is not raised.

    ``expected_failures`` maps names of checks to reasons; such a check fails if it passes.
    """
    reason = (expected_failures or {}).get(check.name)
    start = time.perf_counter()
    try:
        check(*make(), slot)
    except NotApplicable as reason_to_skip:
        return Result(check.name, "skipped", time.perf_counter() - start, str(reason_to_skip))
    except Exception as error:
        message = (
            str(error) if type(error).__module__.startswith("janus_") else f"{type(error).__name__}: {error}"
        )
        outcome: Literal["expected", "failed"] = "failed" if reason is None else "expected"
        return Result(check.name, outcome, time.perf_counter() - start, message if reason is None else reason)
    seconds = time.perf_counter() - start
    if reason is not None:
        return Result(check.name, "failed", seconds, f"it passes, and was expected to fail: {reason}")
    return Result(check.name, "passed", seconds)


@cache
def _load(point: EntryPoint) -> Check:
    """Load a check of another package; an import error is raised when the check is run."""
    try:
        function = point.load()
    except Exception as error:
        missing = missing_extra(error, f"'{point.name}'") if isinstance(error, ModuleNotFoundError) else None
        failure = NotApplicable(str(missing)) if missing else error

        def run(component: Any, example: Any) -> None:
            raise failure

        return Check(point.name, run, MODEL_SLOTS)
    return next(check for check in REGISTERED.values() if check.run is function)
