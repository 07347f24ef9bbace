"""Runs an engine to its end: progress, figures, checkpoints, and a clean stop when it is interrupted."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from janus_modular.errors import TrainingError
from janus_modular.protocols import Tracker
from janus_modular.training.engine import Engine, Metrics, scalar_objective
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig

W = TypeVar("W")


def fit(
    module: nn.Module,
    losses: Callable[[W], Mapping[str, Tensor]],
    work: Iterable[W],
    *,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    title: str = "training",
    trackers: Sequence[Tracker] = (),
    log_every: int = 10,
    quiet: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Train any module by a function of its batches that returns named scalar losses.

    ``work`` yields a batch for each step. Figures of the last logged steps are returned. Janus itself
    is trained by `janus_modular.training.train`, on the same engine.

    Raises:
        TrainingError: nothing learns, a loss is not finite, or ``work`` ends too early.
    """
    module.train()
    engine = Engine(module, scalar_objective(losses), optimizer, schedule, autocast=autocast)
    metrics = run(engine, work, title=title, trackers=trackers, log_every=log_every, quiet=quiet)
    module.eval()
    return metrics


def run(
    engine: Engine[W],
    work: Iterable[W],
    *,
    title: str,
    trackers: Sequence[Tracker] = (),
    log_every: int = 10,
    quiet: bool = False,
    after_step: Callable[[int, bool], None] | None = None,
) -> dict[str, float]:
    """Take all steps that are left, and return the last figures that were logged.

    ``after_step(done, stopping)`` is called with the number of steps done; when SIGINT or SIGTERM comes,
    the step at hand is finished and ``stopping`` is True. Losses are logged under the steps done.

    Raises:
        KeyboardInterrupt: it was interrupted, after the step and ``after_step``.
        TrainingError: ``work`` ends too early, or a loss is not finite.
    """
    source = iter(work)
    last, recent = engine.schedule.last, Metrics()
    logged: dict[str, float] = {}
    since = time.perf_counter()
    with _interrupts() as interrupted, _progress(title, engine.next_step, last, quiet) as advance:
        while engine.next_step < last:
            try:
                piece = next(source)
            except StopIteration:
                raise TrainingError(f"the work ended at step {engine.next_step} of {last}.") from None
            recent.add(engine.step(piece))
            done = engine.next_step
            stopping = bool(interrupted)
            if done % log_every == 0 or done == last or stopping:
                now = time.perf_counter()
                logged = recent.values() | {"steps_per_second": recent.steps / (now - since)}
                if "tokens" in recent.counts:
                    logged["tokens_per_second"] = recent.counts["tokens"] / (now - since)
                for tracker in trackers:
                    _log(tracker, done, logged)
                recent, since = Metrics(), now
            advance(done, logged)
            if after_step:
                after_step(done, stopping)
            if stopping:
                raise KeyboardInterrupt
    return logged


def _log(tracker: Tracker, done: int, values: Mapping[str, float]) -> None:
    try:
        tracker.log(done, values)
    except Exception as error:  # trackers are anybody's
        raise TrainingError(
            f"{type(tracker).__name__}: the figures of step {done} cannot be written:"
            f" {error or type(error).__name__}. Mend that, or choose other trackers."
        ) from error


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list (main thread only: no other gets them); a second stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}

    def note(which: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(which)

    for which in before:
        signal.signal(which, note)
    try:
        yield seen
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


@contextmanager
def _progress(
    title: str, done: int, last: int, quiet: bool
) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        task = progress.add_task(title, total=last, completed=done, said="")

        def advance(done: int, metrics: Mapping[str, float]) -> None:
            said = f"loss {metrics['loss']:.4f}" if "loss" in metrics else ""
            progress.update(task, completed=done, said=said)

        yield advance
