"""Trains or describes the stages of a chain, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from janus_modular.checkpoints.native import read_record
from janus_modular.errors import TrainingError
from janus_modular.model.device import choose_device
from janus_modular.plugins import Plugins
from janus_modular.training.dry_run import dry_run
from janus_modular.training.early_stop import is_over
from janus_modular.training.processes import Processes
from janus_modular.training.run_folder import newest_checkpoint, step_name
from janus_modular.training.run_setup import find_checkpoint
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train

State = Literal["new", "interrupted", "finished"]


def train_chain(stages: Mapping[str, TrainConfig], *, resume: bool, quiet: bool, plugins: Plugins) -> Path:
    """Train the stages in order; return the folder of the last one's model.

    With ``resume``, finished stages are left out, and the one that was interrupted continues.

    Raises:
        TrainingError: there is nothing to resume, or a run that is not to be resumed.
        JanusError: see `train`.
    """
    processes = Processes.from_environment()
    first, *_ = stages.values()
    model = Path(first.output) / "model"
    with processes.started(processes.device(choose_device(first.device), first.device)):
        states = processes.on_first(lambda: [_state(config) for config in stages.values()])
        if resume and set(states) == {"new"}:
            raise TrainingError("there is nothing to resume: no stage has a checkpoint. Leave --resume out.")
        for number, (name, config, state) in enumerate(zip(stages, stages.values(), states, strict=True), 1):
            model, title = Path(config.output) / "model", f"stage {number} of {len(stages)}, {name}"
            if resume and state == "finished":
                processes.on_first(lambda config=config: _check_finished(config))  # type: ignore[misc]
                if processes.is_first and not quiet:
                    Console(stderr=True).print(f"{title}: finished, {model}", soft_wrap=True)
                continue
            train(config, resume=resume and state != "new", quiet=quiet, title=title, plugins=plugins)
    return model


def dry_run_chain(
    stages: Mapping[str, TrainConfig], plugins: Plugins, console: Console, *, resume: bool
) -> None:
    """Describe each stage; one whose start does not exist yet is described with the first stage's model.

    Raises:
        JanusError: an error that would stop the run.
    """
    first, *_ = stages.values()
    for name, config in stages.items():
        console.rule(name)
        if config.init and first.model and not Path(config.init).is_dir():
            config = replace(config, init=None, wrap=None, model=first.model)
        dry_run(config, plugins, console, resume=resume and _state(config) != "new")


def _state(config: TrainConfig) -> State:
    checkpoint = newest_checkpoint(Path(config.output))
    if checkpoint is None:
        return "new"
    early_stop = config.validation.early_stop
    is_last = checkpoint.name == step_name(config.schedule.num_steps) or (
        early_stop is not None and is_over(early_stop, read_record(checkpoint).get("training", {}))
    )
    return "finished" if is_last and (Path(config.output) / "model").is_dir() else "interrupted"


def _check_finished(config: TrainConfig) -> None:
    """Raise TrainingError if a finished stage was trained with other settings."""
    find_checkpoint(Path(config.output), config, True)
