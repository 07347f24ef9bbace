"""Checkpoints that several processes write together: what is wrong with one is an error on all of them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from janus_modular import TrainingError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.training import train as train_module
from janus_modular.training.engine import Engine, Metrics
from janus_modular.training.resume import check_checkpoint
from janus_modular.training.run_folder import newest_checkpoint
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train
from janus_modular.weights.checksums import FILE, HashingFile
from janus_modular.weights.chunks import chunk_name
from janus_modular.weights.files import open_weights

from .conftest import Make, Rank, connected_ranks, small_config, write_data

Ranks = Callable[..., list[Rank]]

FSDP = {"backbone": "fsdp", "understanding.encoder": "fsdp"}
SECOND = chunk_name("model", 1, 2)
STATE = chunk_name("training", 1, 2)


def run(config: TrainConfig, *, resume: bool = False) -> Callable[[int], str]:
    return lambda rank: str(train(config, quiet=True, resume=resume))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes, with the checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("sharded")
    keys = {"batch": 6, "parallel": FSDP, "checkpoint_every": 1, "schedule__stop": 2}
    config = small_config(write_data(folder / "data"), folder / "run", **keys)
    with connected_ranks(folder) as ranks:
        assert [outcome.error for outcome in ranks(2, run(config))] == ["", ""]
    return Path(config.output)


@pytest.fixture
def resumed(make: Make, sharded: Path) -> TrainConfig:
    """A config that resumes from a copy of the run, on the same data."""
    config = make(batch=6, parallel=FSDP, schedule__stop=3)
    shutil.copytree(sharded, config.output, symlinks=True)
    return config


def test_each_process_writes_its_part(sharded: Path) -> None:
    checkpoint = sharded / "checkpoints/step-0000002"
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    assert files == [chunk_name(stem, rank, 2) for stem in ("model", "training") for rank in (0, 1)]
    sizes = [(checkpoint / file).stat().st_size for file in files]
    assert 0.25 < (sizes[0] + sizes[2]) / sum(sizes) < 0.75  # whole tensors go to either
    assert (sharded / "checkpoints/latest").resolve() == checkpoint.resolve()


def test_the_checkpoint_and_the_final_model_open_alike(sharded: Path) -> None:
    """The final model is a plain checkpoint, whose weights are whole."""
    checkpoint, model = sharded / "checkpoints/latest", sharded / "model"
    assert [path.name for path in model.glob("*.safetensors")] == ["model.safetensors"]
    torch.testing.assert_close(dict(open_weights(checkpoint)), dict(open_weights(model)), rtol=0, atol=0)
    opened = [dict(ModelAssembly.from_checkpoint(path).model.state_dict()) for path in (checkpoint, model)]
    torch.testing.assert_close(*opened, rtol=0, atol=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [SECOND, STATE])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(Path.unlink, "is missing"), (cut, "changed or damaged"), (flip, "changed or damaged")],
)
def test_a_shard_that_is_not_what_was_written_is_an_error(
    resumed: TrainConfig, name: str, damage: Callable[[Path], object], words: str
) -> None:
    """At another number of processes: here, of one."""
    checkpoint = Path(resumed.output) / "checkpoints/step-0000002"
    damage(checkpoint / name)
    with pytest.raises(TrainingError, match=rf"{name} .*{words}.*\n.*--resume continues from step-0000001"):
        check_checkpoint(checkpoint, resumed)
    if damage is Path.unlink:
        with pytest.raises(TrainingError, match=f"{name} is missing"):
            train(resumed, quiet=True, resume=True)
    shutil.rmtree(checkpoint)
    train(resumed, quiet=True, resume=True)


def test_a_missing_shard_is_an_error_on_every_rank(resumed: TrainConfig, ranks: Ranks) -> None:
    (Path(resumed.output) / "checkpoints/step-0000002" / SECOND).unlink()
    for outcome in ranks(3, run(resumed, resume=True)):
        assert outcome.error.startswith("TrainingError: ")
        assert f"{SECOND} is missing; {FILE} names it." in outcome.error


def test_an_altered_shard_is_an_error_on_every_rank(resumed: TrainConfig, ranks: Ranks) -> None:
    """Each process hashes its share of the files; one of them comes upon it."""
    flip(Path(resumed.output) / "checkpoints/step-0000002" / STATE)
    errors = sorted(outcome.error for outcome in ranks(3, run(resumed, resume=True)))
    assert [error.split(":")[0] for error in errors] == ["OtherRankError", "OtherRankError", "TrainingError"]
    for error in errors:
        assert f"{STATE} was changed or damaged" in error
        assert "--resume continues from step-0000001" in error


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_of_a_rank_is_an_error_on_all_and_loses_nothing(
    make: Make, ranks: Ranks, background: bool
) -> None:
    """The second rank's disk is full from the second checkpoint on, as /dev/full always is."""
    keys = {"batch": 6, "parallel": FSDP, "checkpoint_every": 2, "checkpoint_async": background}
    config = make(**keys)

    def fill(rank: int) -> None:
        opened, files = HashingFile.__init__, []

        def full(file: HashingFile, path: Path) -> None:
            files.append(path)
            opened(file, Path("/dev/full") if rank == 1 and len(files) > 2 else path)

        HashingFile.__init__ = full  # type: ignore[method-assign]
        train(config, quiet=True)

    first, second = ranks(2, fill)
    assert second.error.startswith("CheckpointError: ")
    assert first.error.startswith("OtherRankError: rank 1: ")
    for outcome in (first, second):
        assert f"step-0000004 could not be written: [Errno {errno.ENOSPC}]" in outcome.error
        assert "Existing files are unchanged" in outcome.error
        assert "could not be saved" in outcome.error
        assert "resume from" in outcome.error
        assert "step-0000002 with --resume" in outcome.error
    folder = Path(config.output) / "checkpoints"
    assert sorted(os.listdir(folder)) == ["latest", "step-0000002"]
    assert [outcome.error for outcome in ranks(2, run(config, resume=True))] == ["", ""]


class AveragingEngine(Engine[Any]):
    """Keeps an average of the parameters as further state."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        average = {name: parameter.detach().clone() for name, parameter in self.trainable.items()}
        self.further_state["average"] = average

    def step(self, batch: Any) -> Metrics:
        metrics = super().step(batch)
        for name, value in self.further_state["average"].items():
            value.lerp_(self.trainable[name].detach(), 0.5)
        return metrics


def averages(config: TrainConfig) -> dict[str, Tensor]:
    tensors = load_file(Path(config.output) / "checkpoints/latest/training.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("training/average/")}


def test_further_state_is_sharded_and_restored(
    make: Make, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An average of the weights, say: saved by two processes, continued by one."""
    monkeypatch.setattr(train_module, "Engine", AveragingEngine)
    alone, moved = make(batch=6), make(batch=6, output=str(tmp_path / "moved"))
    train(alone, quiet=True)
    half = make(batch=6, output=moved.output, parallel=FSDP, schedule__stop=3)
    assert [outcome.error for outcome in ranks(2, run(half))] == ["", ""]
    train(moved, quiet=True, resume=True)
    assert len(averages(alone)) > 20
    torch.testing.assert_close(averages(moved), averages(alone), rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    with pytest.raises(TrainingError, match=r"it has average/.*, which this run does not train with"):
        train(make(batch=6, output=moved.output, schedule__steps=7), quiet=True, resume=True)
    assert newest_checkpoint(Path(moved.output)) is not None
