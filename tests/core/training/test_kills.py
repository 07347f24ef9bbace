"""A killed run continues from a complete checkpoint, and removes incomplete files."""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_modular.checkpoints import ModelAssembly
from janus_modular.checkpoints.native import read_record
from janus_modular.training.checkpoint_writer import CheckpointWriter
from janus_modular.training.engine import Engine
from janus_modular.training.run_checkpoints import link_final_model
from janus_modular.training.run_folder import newest_checkpoint, run_folder
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig
from janus_modular.training.train import train
from janus_modular.weights.checksums import verify_checksums
from janus_modular.weights.writing import is_checkpoint_file

from .conftest import Make

EVERY = pytest.param(1, id="every", marks=pytest.mark.proof)


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint is of, once its files are verified."""
    verify_checksums(folder, is_checkpoint_file=is_checkpoint_file)
    return int(read_record(folder)["training"]["step"])


def leftovers(output: Path) -> list[Path]:
    return [path for path in output.rglob(".*") if path.name.startswith(".")]


@pytest.mark.parametrize("every", [pytest.param(6, id="every sixth"), EVERY])
def test_saving_survives_a_kill_at_each_file_operation(
    make: Make, built: Any, tmp_path: Path, killed_at: Any, every: int
) -> None:
    """A checkpoint is written, the one before it removed, and the finished model replaced."""
    model, processor = built
    config = make(keep=1)
    output, kept = Path(config.output), tmp_path / "kept"
    engine = Engine(model, lambda _: [], OptimizerConfig(), ScheduleConfig())

    def write(step: int) -> None:
        engine.next_step = step
        with run_folder(output):
            writer = CheckpointWriter(ModelAssembly(model, processor), engine, config)
            writer.save({})
            assert writer.last is not None
            link_final_model(output, writer.last)

    write(1)
    shutil.copytree(output, kept, symlinks=True)
    for number in count(0, every):
        was_killed = killed_at(number, lambda: write(2))
        with run_folder(output):  # as the next command takes it
            assert leftovers(output) == [output / ".lock"]
            found = newest_checkpoint(output)
            assert found is not None
            assert (output / "checkpoints/latest").exists()
            assert found.name == f"step-{step_of(found):07}"
            assert step_of(output / "model") <= step_of(found) <= 2
        write(2)
        assert sorted(os.listdir(output / "checkpoints")) == ["latest", "step-0000002"]
        assert step_of(output / "checkpoints/latest") == 2
        assert step_of(output / "model") == 2
        assert leftovers(output) == []
        shutil.rmtree(output)
        shutil.copytree(kept, output, symlinks=True)
        if not was_killed:
            break
    assert number > 60  # operations that were tried


def test_resuming_a_run_without_steps_left_drops_old_checkpoints(make: Make) -> None:
    """A run that is killed between its last save and the removal of the checkpoint before leaves both."""
    config = make(checkpoint_every=1, keep=2, schedule={"steps": 2})
    train(config, quiet=True)
    train(
        make(output=config.output, checkpoint_every=1, keep=1, schedule={"steps": 2}), quiet=True, resume=True
    )
    assert sorted(os.listdir(Path(config.output) / "checkpoints")) == ["latest", "step-0000002"]


@pytest.mark.proof
def test_a_run_killed_at_any_file_operation_resumes_bitwise(
    make: Make, tmp_path: Path, killed_at: Any
) -> None:
    whole = train(make(output=str(tmp_path / "whole"), schedule={"steps": 3}), quiet=True)
    expected = dict(ModelAssembly.from_checkpoint(whole).model.state_dict())
    config = make(checkpoint_every=1, keep=1, schedule={"steps": 3})
    output = Path(config.output)
    for number in count():
        was_killed = killed_at(number, lambda: train(config, quiet=True))
        model = train(config, quiet=True, resume=newest_checkpoint(output) is not None)
        torch.testing.assert_close(
            dict(ModelAssembly.from_checkpoint(model).model.state_dict()), expected, rtol=0, atol=0
        )
        assert leftovers(output) == []
        assert sorted(os.listdir(output / "checkpoints")) == ["latest", "step-0000003"]
        shutil.rmtree(output)
        if not was_killed:
            break
    assert number > 100
