"""A checkpoint is the old or the new one, whenever the process that writes it dies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_modular.checkpoints import ModelAssembly, convert, save
from janus_modular.weights.checksums import verify_checksums
from janus_modular.weights.writing import is_checkpoint_file


def first_weight(folder: Path) -> float:
    """Return the number that tells the old checkpoint from the new one; the folder is verified."""
    verify_checksums(folder, is_checkpoint_file=is_checkpoint_file)
    model = ModelAssembly.from_checkpoint(folder).model
    return next(iter(model.parameters())).flatten()[0].item()


def try_kills(target: Path, write: Callable[[], object], killed_at: Any, numbers: Any) -> int:
    """Kill ``write`` at each of ``numbers``; the write after that must succeed and leave nothing else."""
    old = shutil.copytree(target, target.with_name("kept"))
    (target / "notes.txt").write_text("mine")
    for number in numbers:
        was_killed = killed_at(number, write)
        if not was_killed:
            return number
        write()
        assert first_weight(target) == 2
        assert (target / "notes.txt").read_text() == "mine"
        assert sorted(path.name for path in target.parent.iterdir()) == ["kept", "source", target.name]
        shutil.rmtree(target)
        shutil.copytree(old, target)
        (target / "notes.txt").write_text("mine")
    return number


@pytest.fixture
def folders(make: Any, tmp_path: Path) -> tuple[Path, Path, Any]:
    """A checkpoint of ones, where one of twos is to be written; and that, as a model and as a folder."""
    assembly = make()
    model = assembly.model
    for value, name in ((1.0, "target"), (2.0, "source")):
        with torch.no_grad():
            next(iter(model.parameters())).view(-1)[0] = value
        save(assembly, tmp_path / name)
    return tmp_path / "source", tmp_path / "target", assembly


@pytest.mark.parametrize(
    "step", [pytest.param(7, id="every seventh"), pytest.param(1, id="every", marks=pytest.mark.proof)]
)
@pytest.mark.parametrize("command", ["save", pytest.param("convert", marks=pytest.mark.slow)])
def test_a_checkpoint_survives_a_kill_at_each_file_operation(
    folders: Any, killed_at: Any, command: str, step: int
) -> None:
    source, target, made = folders
    writes = {
        "save": lambda: save(made, target),
        "convert": lambda: convert(source, target),
    }
    last = try_kills(target, writes[command], killed_at, count(0, step))
    assert last > 20  # so many operations there are at least
