"""The training loop: progress, metrics, checkpoints, and a clean stop when the process is interrupted."""

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
from janus_modular.training.trackers import tracker_errors

BatchT = TypeVar("BatchT")


def fit(
    module: nn.Module,
    losses: Callable[[BatchT], Mapping[str, Tensor]],
    batches: Iterable[BatchT],
    *,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    title: str = "training",
    trackers: Sequence[Tracker] = (),
    log_every: int = 10,
    quiet: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Train any module with a function that returns the named scalar losses of a batch.

    ``batches`` yields a batch for each step. Return the metrics that were logged last. Janus itself is
    trained by `janus_modular.training.train`, with the same engine.

    Raises:
        TrainingError: no parameter is trainable, a loss is not finite, or ``batches`` ends too early.
    """
    module.train()
    engine = Engine(module, scalar_objective(losses), optimizer, schedule, autocast=autocast)
    metrics = run(engine, batches, title=title, trackers=trackers, log_every=log_every, quiet=quiet)
    module.eval()
    return metrics


def run(
    engine: Engine[BatchT],
    batches: Iterable[BatchT],
    *,
    title: str,
    trackers: Sequence[Tracker] = (),
    log_every: int = 10,
    quiet: bool = False,
    after_step: Callable[[int, bool], bool] | None = None,
    rates: Callable[[float], Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Run the remaining steps of ``engine``; return the metrics that were logged last.

    Progress goes to stderr unless ``quiet``: a bar, or a line for each log entry where there is no terminal.

    ``after_step(done, stopping)`` is called with the number of finished steps; after SIGINT or SIGTERM, the
    current step is finished and ``stopping`` is True. The run ends early if it returns True. Metrics are
    logged with the number of finished steps; ``rates(seconds)`` returns further ones since the last entry.

    Raises:
        KeyboardInterrupt: a signal came; raised after the step and ``after_step``.
        TrainingError: ``batches`` ends too early, or a loss is not finite.
    """
    remaining = iter(batches)
    last, recent = engine.schedule.num_steps, Metrics()
    logged: dict[str, float] = {}
    since = time.perf_counter()
    with _interrupts() as interrupted, _progress(title, engine.next_step, last, quiet) as advance:
        while engine.next_step < last:
            try:
                batch = next(remaining)
            except StopIteration:
                raise TrainingError(f"the batches ended at step {engine.next_step} of {last}.") from None
            recent.add(engine.step(batch))
            done = engine.next_step
            stopping = engine.processes.any(bool(interrupted))
            is_logged = done % log_every == 0 or done == last or stopping
            if is_logged:
                now = time.perf_counter()
                logged = recent.values() | {"steps_per_second": recent.steps / (now - since)}
                for unit in ("samples", "tokens"):
                    if unit in recent.counts:
                        logged[f"{unit}_per_second"] = recent.counts[unit] / (now - since)
                logged |= rates(now - since) if rates else {}
                for tracker in trackers:
                    with tracker_errors(tracker, f"the metrics of step {done}"):
                        tracker.log(done, logged)
                recent, since = Metrics(), now
            advance(done, logged, is_logged)
            is_over = after_step is not None and after_step(done, stopping)
            if stopping:
                raise KeyboardInterrupt
            if is_over:
                break
    return logged


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; a second signal raises KeyboardInterrupt at once.

    Only the main thread can handle signals; in other threads the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for number in previous_handlers:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def _progress(
    title: str, done: int, last: int, quiet: bool
) -> Iterator[Callable[[int, Mapping[str, float], bool], None]]:
    """Show a bar in a terminal or a notebook; elsewhere print a line whenever metrics are logged."""
    console = Console(stderr=True)
    is_terminal = console.is_interactive and console.file.isatty()  # FORCE_COLOR alone makes no terminal
    if not (quiet or is_terminal or console.is_jupyter):

        def print_line(done: int, metrics: Mapping[str, float], is_logged: bool) -> None:
            if is_logged:
                console.out(f"{title}: step {done} of {last}: {describe_metrics(metrics)}", highlight=False)

        yield print_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        task = progress.add_task(title, total=last, completed=done, status="")

        def advance(done: int, metrics: Mapping[str, float], is_logged: bool) -> None:
            status = f"loss {metrics['loss']:.4f}" if "loss" in metrics else ""
            progress.update(task, completed=done, status=status)

        yield advance


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """Return losses (in all, by name, by source), learning rate and speed: ``loss 2.3107, lr 0.0001``."""
    names = sorted(name for name in metrics if name.partition("/")[0] in ("loss", "source"))
    losses = [f"{name} {metrics[name]:.4f}" for name in names]
    unit = "samples" if "samples_per_second" in metrics else "steps"
    return ", ".join([*losses, f"lr {metrics['lr']:.3g}", f"{metrics[f'{unit}_per_second']:.3g} {unit}/s"])
