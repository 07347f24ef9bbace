"""Runs in short, in full and side by side, as plain values for tables and JSON. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from janus_modular.config import flatten
from janus_modular.errors import TrainingError
from janus_modular.suggest import did_you_mean
from janus_modular.training.run_folder import VALIDATION
from janus_modular.training.run_record import Run

SETTINGS = (
    *("init", "wrap", "learn", "mixture", "batch", "length", "accumulate", "supervise", "condition_dropout"),
    *("optimizer", "schedule", "parallel", "activation_checkpointing", "dtype", "seed"),
)
"""The settings of a training config that `details` returns, in order."""


def summary(run: Run) -> dict[str, Any]:
    """Return the state of a run, its progress and its last losses.

    Raises:
        TrainingError: a file of the run is damaged.
    """
    return {
        "run": str(run.folder),
        "state": run.state,
        "done": run.done,
        "steps": run.num_steps,
        "loss": run.last("loss"),
        "validation": run.validation_losses,
        "changed": run.changed,
        "model": run.model,
    }


def details(run: Run) -> dict[str, Any]:
    """Return the summary of a run, its settings, plugins, checkpoints, last metrics and validations.

    Raises:
        TrainingError: a file of the run is damaged.
    """
    metrics = run.metrics
    losses = {step: _validation_losses(values) for step, values in metrics.items()}
    files = {validation.step: validation for validation in run.validation}
    last = max(metrics, default=None)
    return {
        **summary(run),
        "written_by": run.record.get("written_by"),
        "settings": {name: run.config[name] for name in SETTINGS if name in run.config},
        "plugins": run.record.get("plugins", []),
        "checkpoints": run.checkpoints,
        "metrics": {} if last is None else {"step": last, **metrics[last]},
        "validations": [
            {
                "step": step,
                "losses": losses.get(step, {}),
                "drawings": [str(path) for path in files[step].drawings] if step in files else [],
                "answers": files[step].answers if step in files else [],
            }
            for step in sorted({*(step for step, values in losses.items() if values), *files})
        ],
    }


def differing_settings(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Return the settings in which runs differ, by dotted key and run, without ``output``.

    A setting that a run does not have is left out of its values. Runs without a checkpoint have no settings
    yet, and are left out altogether.
    """
    settings = {str(run.folder): flatten(run.config) for run in runs if run.config}
    keys = {key for values in settings.values() for key in values} - {"output"}
    missing = object()
    return {
        key: {name: values[key] for name, values in settings.items() if key in values}
        for key in sorted(keys)
        if len({repr(values.get(key, missing)) for values in settings.values()}) > 1
    }


def common_metrics(runs: Sequence[Run], names: Sequence[str]) -> dict[str, dict[int, dict[str, float]]]:
    """Return the values of metrics at the steps that all runs have, by metric, step and run.

    Args:
        runs: the runs.
        names: the metrics; none: all losses, see `is_loss`.

    Raises:
        TrainingError: no run has logged a metric, or a file of metrics is damaged.
    """
    logged = {name for run in runs for values in run.metrics.values() for name in values}
    if unknown := [name for name in names if name not in logged]:
        raise TrainingError(
            f"no run has logged the metric {unknown[0]!r}; logged: {', '.join(sorted(logged)) or 'nothing'}."
            f" {did_you_mean(unknown[0], logged)}".rstrip()
        )
    return {
        name: {
            step: {str(run.folder): run.metrics[step][name] for run in runs}
            for step in runs[0].metrics
            if all(name in run.metrics.get(step, {}) for run in runs)
        }
        for name in (names or sorted(filter(is_loss, logged)))
    }


def is_loss(name: str) -> bool:
    """Return True for a loss: in all, by name, by source, or of validation."""
    return name.partition("/")[0] in ("loss", "source", VALIDATION)


def _validation_losses(values: dict[str, float]) -> dict[str, float]:
    prefix = f"{VALIDATION}/"
    return {name.removeprefix(prefix): x for name, x in values.items() if name.startswith(prefix)}
