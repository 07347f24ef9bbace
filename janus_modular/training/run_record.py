"""What a run folder records: settings, metrics, checkpoints and validation, for reading only.

Imports no torch and writes nothing. A run may be training meanwhile: a last line of metrics without its end
is left out.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from janus_modular.config import flatten
from janus_modular.errors import TrainingError
from janus_modular.foreign import foreign_errors, printable, read_json, read_text, reason
from janus_modular.locking import is_locked
from janus_modular.training.run_folder import LOCK, VALIDATION, checkpoint_folders, step_folders

METRICS = "metrics.jsonl"
"""Where metrics are expected if no tracker of the config names a ``.jsonl`` file."""

LARGEST = 1e300
"""Largest magnitude of a value, so that differences of values are finite."""

CONTENT = {"checkpoints", "model", VALIDATION}
"""Folders of a run that hold no other run."""

State = Literal["running", "finished", "interrupted"]
Metrics = dict[int, dict[str, float]]


@dataclass(frozen=True)
class ValidationStep:
    """The files of a validation."""

    step: int
    drawings: list[Path]
    answers: list[dict[str, str]]  # question, answer


@dataclass(frozen=True)
class Run:
    """A run folder; every property reads files when it is first used.

    Raises:
        TrainingError: (each property) a file is damaged; names it.
    """

    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        """Return config.json of the newest checkpoint or, without checkpoints, of the model; or nothing."""
        folders = [self.folder / "model", *checkpoint_folders(self.folder)]
        files = [path for folder in folders if (path := folder / "config.json").is_file()]
        if not files:
            return {}
        record = read_json(files[-1], TrainingError)
        training: Any = record.get("training")
        is_complete = isinstance(training, dict) and type(training.get("step")) is int
        if not is_complete or not _is_config(training.get("config")) or not _is_list(record.get("plugins")):
            raise TrainingError(
                f"{files[-1]} has no complete record of a training; expected plugins, training.step and"
                " training.config as `janus-modular train` writes them. Remove the damaged checkpoint, or the"
                " model."
            )
        return record

    @property
    def config(self) -> dict[str, Any]:
        """Return the resolved training config; empty before the first checkpoint."""
        return self.record["training"]["config"] if self.record else {}

    @property
    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints, the oldest first."""
        return [folder.name for folder in checkpoint_folders(self.folder)]

    @property
    def metrics_file(self) -> Path:
        """Return the file of metrics: that of a tracker with a ``.jsonl`` file, else ``metrics.jsonl``."""
        trackers = self.config.get("trackers") or []
        files = [tracker.get("file") for tracker in trackers if isinstance(tracker, dict)]
        named = [file for file in files if isinstance(file, str) and file.endswith(".jsonl")]
        return self.folder / (named[0] if named else METRICS)

    @cached_property
    def metrics(self) -> Metrics:
        """Return the logged values by step and name; empty without a file of metrics."""
        return read_metrics(self.metrics_file) if os.path.lexists(self.metrics_file) else {}

    @property
    def done(self) -> int:
        """Return the number of finished steps that are saved or logged."""
        return max([self.record["training"]["step"] if self.record else 0, *self.metrics])

    @property
    def num_steps(self) -> int | None:
        """Return the number of steps of the run; None before the first checkpoint."""
        schedule = self.config.get("schedule", {})
        stop = schedule.get("stop")
        return min(schedule["steps"], stop) if isinstance(stop, int) else schedule.get("steps")

    @property
    def state(self) -> State:
        """Return the state of the run; on Windows, which has no lock, a running one is interrupted."""
        with foreign_errors(self.folder / LOCK, TrainingError, "Make it readable."):
            if is_locked(self.folder / LOCK):
                return "running"
        early_stop = self.record["training"].get("early_stop") if self.record else None
        is_over = isinstance(early_stop, dict) and early_stop.get("is_over") is True
        is_done = is_over or (self.num_steps is not None and self.done >= self.num_steps)
        return "finished" if is_done and (self.folder / "model").is_dir() else "interrupted"

    @property
    def changed(self) -> str:
        """Return the local time of the last change of metrics or checkpoints, to the second."""
        saved = [folder / "config.json" for folder in checkpoint_folders(self.folder)[-1:]]
        with foreign_errors(self.folder, TrainingError, "Make it readable."):
            files = [path for path in (self.metrics_file, *saved) if path.exists()] or [self.folder]
            last = max(path.stat().st_mtime for path in files)
        return datetime.fromtimestamp(last).astimezone().isoformat(timespec="seconds")

    @property
    def model(self) -> str:
        """Return what the run starts from: the checkpoint ``init``, or the names of the main components."""
        if self.config.get("init"):
            return str(self.config["init"])
        names = flatten(self.config.get("model") or {})
        paths = ("understanding.encoder", "generation.tokenizer", "backbone")
        return ", ".join(str(names[f"{path}.name"]) for path in paths if f"{path}.name" in names)

    def last(self, name: str) -> float | None:
        """Return the value of a metric that was logged last."""
        return next((values[name] for values in reversed(self.metrics.values()) if name in values), None)

    @property
    def validation_losses(self) -> dict[str, float]:
        """Return the last loss of each held-out source, over all its losses."""
        names = sorted({name for values in self.metrics.values() for name in values})
        within = [name for name in names if name.startswith(f"{VALIDATION}/")]
        sources = [name for name in within if any(longer.startswith(f"{name}/") for longer in within)]
        return {name.partition("/")[2]: value for name in sources if (value := self.last(name)) is not None}

    @cached_property
    def validation(self) -> list[ValidationStep]:
        """Return the drawings and answers of each validation, in order."""
        return [
            ValidationStep(
                int(folder.name.partition("-")[2]),
                sorted(folder.glob("drawing-*.png"), key=lambda path: (len(path.name), path.name)),
                _read_answers(folder / "answers.json"),
            )
            for folder in step_folders(self.folder / VALIDATION)
        ]

    def prompt(self, drawing: Path) -> str:
        """Return the prompt of a validation drawing; the name of the file if the config has none for it."""
        prompts = (self.config.get("validation") or {}).get("prompts") or []
        number = drawing.stem.partition("-")[2]
        return str(prompts[int(number)]) if number.isdigit() and int(number) < len(prompts) else drawing.stem


def open_run(folder: Path) -> Run:
    """Return the run in a folder.

    Raises:
        TrainingError: the folder is none of a run.
    """
    if not is_run(folder):
        problem = "has neither checkpoints nor metrics" if folder.is_dir() else "is no folder"
        raise TrainingError(
            f"{printable(folder)} {problem}; expected the output folder of `janus-modular train`."
            " `janus-modular runs list FOLDER` lists the runs below a folder."
        )
    return Run(folder)


def is_run(folder: Path) -> bool:
    """Return True if a folder has checkpoints or a file ``metrics.jsonl``, or a process trains there."""
    with foreign_errors(folder, TrainingError, "Make it readable."):
        has_files = bool(checkpoint_folders(folder)) or (folder / METRICS).is_file()
        return has_files or is_locked(folder / LOCK)


def find_runs(folder: Path) -> list[Run]:
    """Return the runs in a folder and below, by path.

    Raises:
        TrainingError: there is no such folder, or a folder cannot be read.
    """
    if not folder.is_dir():
        raise TrainingError(f"there is no folder {printable(folder)}; expected a folder with runs.")

    def fail(error: OSError) -> None:
        raise TrainingError(
            f"{printable(error.filename)} cannot be read: {reason(error)}. Make it readable."
        ) from error

    runs = []
    for path, folders, _ in os.walk(folder, onerror=fail):
        if is_run(Path(path)):
            runs.append(Run(Path(path)))
            folders[:] = [name for name in folders if name not in CONTENT]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return runs


def read_metrics(file: Path) -> Metrics:
    """Return the values of a file of metrics by step; lines of the same step are merged.

    Raises:
        TrainingError: a line, other than a last one without its end, is no JSON object of numbers
            with a step; names file and line.
    """
    metrics: Metrics = {}
    lines = read_text(file, TrainingError).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            step = values.pop("step")
            if type(step) is not int or not all(map(_is_number, [step, *values.values()])):
                raise ValueError("a value is no number")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines):  # a tracker is writing it, or was killed
                continue
            raise TrainingError(
                f"{file}, line {number}: found {printable(line, most=60)!r}; expected a JSON object of"
                ' numbers up to 1e300 with a whole number "step". Remove the line.'
            ) from error
        metrics.setdefault(step, {}).update(values)
    return dict(sorted(metrics.items()))


def _is_number(value: Any) -> bool:
    """Return True for a number that a chart can show; False for NaN, too."""
    return type(value) in (int, float) and abs(value) <= LARGEST


def _is_config(config: Any) -> bool:
    """Return True if the sections of a plain training config that are used here have their types."""
    if not isinstance(config, dict) or not isinstance(config.get("schedule"), dict):
        return False
    if not all(isinstance(config.get(name) or {}, dict) for name in ("model", VALIDATION)):
        return False
    validation: dict[str, Any] = config.get(VALIDATION) or {}
    lists = (config.get("trackers"), validation.get("prompts"))
    has_lists = all(value is None or isinstance(value, list) for value in lists)
    return has_lists and type(config["schedule"].get("steps")) is int


def _is_list(plugins: Any) -> bool:
    return isinstance(plugins, list) and all(isinstance(plugin, dict) for plugin in plugins)


def _read_answers(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    text = read_text(file, TrainingError)
    with foreign_errors(file, TrainingError, "Remove it."):
        answers = json.loads(text)
    is_list = isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers)
    if not is_list or not all(
        isinstance(answer.get(key), str) for answer in answers for key in ("question", "answer")
    ):
        raise TrainingError(
            f"{file}: found {printable(text, most=60)!r}; expected a list of objects with question and"
            " answer. Remove it."
        )
    return answers
