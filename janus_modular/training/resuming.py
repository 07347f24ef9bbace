"""Checkpoints of a run: a model that can be used as it is, and beside it what training needs to go on."""

from __future__ import annotations

import errno
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from janus_modular.checkpoints.native import MODEL_TYPE, Saves, read_record, stored, write_description
from janus_modular.checkpoints.writing import link, write_weights, written_aside
from janus_modular.config import to_plain
from janus_modular.errors import TrainingError
from janus_modular.model import JanusModel
from janus_modular.training.engine import Engine
from janus_modular.training.schema import TrainConfig

STATE = "training.pt"

ALMOST_NOTHING = 64 * 2**20
"""So few free bytes mean that the disk was full: what did not fit was given back, or never written."""

FREE = {
    "bad_samples",
    "changed_data",
    "init",
    "workers",
    "device",
    "checkpoint_every",
    "keep",
    "log_every",
    "output",
    "trackers",
    "schedule.steps",
    "schedule.stop",
}
"""What may differ in a run that goes on: nothing that the next steps are computed from, but their number."""


def save(
    output: Path,
    model: JanusModel,
    processor: Saves,
    engine: Engine[Any],
    config: TrainConfig,
    data: Mapping[str, Any],
) -> Path:
    """Write ``checkpoints/step-N`` aside and rename it; then drop all but the newest ``keep``."""
    folder = output / "checkpoints" / f"step-{engine.next_step:07}"
    record = {"step": engine.next_step, "config": to_plain(config), "data": data}
    with written_aside(folder, replaces=MODEL_TYPE) as aside:
        write_description(model, processor, aside, name=output.name, training=record)
        write_weights(aside, stored(model).items())
        write_state(engine.state_dict(), aside / STATE)
    for old in _all(output)[: -config.keep]:
        shutil.rmtree(old)
    return folder


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write an engine's state, tensors and plain containers.

    Raises:
        OSError: the disk did not take it; torch reports that as an internal error with a line of its source.
    """
    try:
        torch.save(state, path)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        if shutil.disk_usage(path.parent).free < ALMOST_NOTHING:
            raise OSError(errno.ENOSPC, "no space left on the disk", path.name) from error
        raise OSError(
            f"{path.name} was cut short; is there a quota, or a limit on the size of files?"
        ) from error


def finish(output: Path, checkpoint: Path) -> Path:
    """Put the model of a checkpoint at ``output/model``: as links, so that it takes no room of its own."""
    model = output / "model"
    with written_aside(model, replaces=MODEL_TYPE) as aside:
        shutil.copytree(
            checkpoint, aside, copy_function=link, dirs_exist_ok=True, ignore=shutil.ignore_patterns(STATE)
        )
    return model


def newest(output: Path) -> Path | None:
    """Return the checkpoint that a run would go on from: the newest that has a state."""
    return max(_all(output), default=None)


def passed_over(output: Path, chosen: Path) -> list[str]:
    """Name the checkpoints that are newer than the one chosen, and without the state that training needs."""
    return [one.name for one in _folders(output) if one.name > chosen.name]


def check_same_run(checkpoint: Path, config: TrainConfig) -> None:
    """Refuse to go on with settings that would make another run of it.

    Raises:
        TrainingError: names what differs, with both values.
    """
    then, now = (_flat(plain) for plain in (read_record(checkpoint)["training"]["config"], to_plain(config)))
    differ = [
        f"  {key}: {then.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE)
    ]
    if differ:
        lines = "\n".join(differ)
        raise TrainingError(
            f"{checkpoint} was made with other settings:\n{lines}\n"
            f"Put them back to resume, or start a new run from its weights: init={checkpoint} output=FOLDER"
        )


def load_state(checkpoint: Path, engine: Engine[Any]) -> None:
    """Bring an engine to where ``checkpoint`` was written.

    Raises:
        TrainingError: its state is damaged, or that of another run.
    """
    path = checkpoint / STATE
    try:
        engine.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise TrainingError(
            f"{path} is damaged, or of another run: {said}\nRemove {checkpoint}, and"
            " --resume goes on from the one before; or start a new run from its weights:"
            f" init={checkpoint} output=FOLDER"
        ) from error


def _all(output: Path) -> list[Path]:
    return [one for one in _folders(output) if (one / STATE).is_file()]


def _folders(output: Path) -> list[Path]:
    found = (output / "checkpoints").glob("step-*")
    return sorted(one for one in found if re.fullmatch(r"step-\d+", one.name))


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {k: v for key, one in tree.items() for k, v in _flat(one, f"{path}.{key}".lstrip(".")).items()}
    return {path: tree}
