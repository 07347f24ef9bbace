"""Checkpoints written by several processes: an error on one rank is an error on all ranks."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from janus_modular import CheckpointError, TrainingError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.training import train as train_module
from janus_modular.training.checkpoint_writer import CheckpointWriter
from janus_modular.training.ema import read_averages
from janus_modular.training.resume import check_checkpoint
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train
from janus_modular.weights.checksums import FILE, HashingFile, write_checksums
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


def test_the_checkpoint_and_the_final_model_are_equal_when_opened(sharded: Path) -> None:
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


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.slow)])
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


MUON = {"lr": 3e-3, "groups": {"backbone": {"name": "muon", "lr": 3e-3}}}


def stored(checkpoint: Path, prefix: str) -> list[dict[str, Tensor]]:
    """Return the tensors whose names begin with a prefix, by the file of training state that has them."""
    return [
        {name: x for name, x in load_file(path).items() if name.startswith(prefix)}
        for path in sorted(checkpoint.glob("training*.safetensors"))
    ]


@pytest.mark.parametrize("prefix", ["training/ema/", "training/optimizer/momentum_buffer/"])
def test_averages_and_states_of_muon_are_written_in_parts(averaged: Path, prefix: str) -> None:
    first, second = stored(averaged / "checkpoints/step-0000003", prefix)
    [whole] = stored(averaged / "checkpoints/step-0000006", prefix)  # written by a single process
    in_parts = [name for name in whole if first.get(name, whole[name]).shape != whole[name].shape]
    assert len(in_parts) > 5
    for name in in_parts:
        assert len(first[name]) + len(second[name]) == len(whole[name]), name
    assert first.keys() | second.keys() == whole.keys()


def test_averages_of_several_processes_are_continued_by_one(
    averaged: Path, make: Make, tmp_path: Path
) -> None:
    """Muon computes its update in bfloat16, whose rounding follows the order of sums: 2e-3 of a weight."""
    alone = make(batch=6, ema=0.5, optimizer=MUON)
    train(alone, quiet=True)
    expected = read_averages(Path(alone.output) / "checkpoints/latest")
    moved = read_averages(averaged / "checkpoints/latest")
    assert len(expected) > 20
    torch.testing.assert_close(dict(moved), dict(expected), rtol=2e-3, atol=2e-3)


def test_averages_are_restored_to_the_bit_by_another_number_of_processes(
    averaged: Path, make: Make, ranks: Ranks
) -> None:
    """Of the whole tensors of one process, each of three takes its part, and writes it again."""
    config = make(batch=6, ema=0.5, optimizer=MUON, parallel=FSDP, schedule__stop=6)
    shutil.copytree(averaged, config.output, symlinks=True)
    checkpoint = Path(config.output) / "checkpoints/step-0000006"

    def written(rank: int) -> str:
        """Save a resumed run at once, as step 6, in place of what it was resumed from."""
        run_steps = train_module._run_steps

        def save_only(prepared: Any, config: TrainConfig, checkpoint: Path, **_: Any) -> Path:
            CheckpointWriter(prepared.assembly, prepared.engine, config).save({})
            return checkpoint

        train_module._run_steps = save_only
        try:
            return str(train(config, quiet=True, resume=True))
        finally:
            train_module._run_steps = run_steps

    before = {name: x.clone() for name, x in read_averages(checkpoint).items()}
    [momenta] = stored(checkpoint, "training/optimizer/momentum_buffer/")
    assert [outcome.error for outcome in ranks(3, written)] == [""] * 3
    torch.testing.assert_close(dict(read_averages(checkpoint)), before, rtol=0, atol=0)
    parts = stored(checkpoint, "training/optimizer/momentum_buffer/")
    assert len(parts) == 3
    for name, momentum in momenta.items():
        joined = torch.cat([part[name] for part in parts if name in part])
        assert torch.equal(joined, momentum), name


def without(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def in_half_precision(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].half()


def of_another_shape(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][None]


AVERAGES = r"the averages \(ema\) are of other parameters: \S+ differs"
MOMENTUM = r"momentum_buffer of \S+ is "


@pytest.mark.parametrize(
    ("prefix", "damage", "words"),
    [
        ("training/ema/", without, AVERAGES),
        ("training/ema/", in_half_precision, AVERAGES),
        ("training/ema/", of_another_shape, AVERAGES),
        ("training/optimizer/momentum_buffer/", without, r"that were updated: \S+ differs"),
        ("training/optimizer/momentum_buffer/", in_half_precision, f"{MOMENTUM}torch.float16"),
        ("training/optimizer/momentum_buffer/", of_another_shape, rf"{MOMENTUM}\(1, "),
    ],
)
def test_averages_and_states_of_muon_are_checked(
    averaged: Path, make: Make, prefix: str, damage: Callable[[dict[str, Tensor], str], None], words: str
) -> None:
    config = make(batch=6, ema=0.5, optimizer=MUON, schedule__steps=7)
    shutil.copytree(averaged, config.output, symlinks=True)
    file = Path(config.output) / "checkpoints/step-0000006/training.safetensors"
    tensors = load_file(file)
    damage(tensors, next(name for name in tensors if name.startswith(prefix)))
    save_file(tensors, file)
    write_checksums(file.parent, {})
    with pytest.raises(TrainingError, match=words):
        train(config, quiet=True, resume=True)


def test_a_resumed_run_may_end_averages_and_not_change_its_optimizer(averaged: Path, make: Make) -> None:
    keys: dict[str, Any] = {"batch": 6, "schedule__steps": 7}
    config = make(**keys, optimizer=MUON)
    shutil.copytree(averaged, config.output, symlinks=True)
    with pytest.raises(TrainingError, match="cannot change between AdamW and Muon"):
        train(make(**keys, ema=0.5), quiet=True, resume=True)
    train(config, quiet=True, resume=True)
    with pytest.raises(CheckpointError, match="its run had no ema"):
        read_averages(Path(config.output) / "checkpoints/step-0000007")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with ema and Muon, whose first half two processes computed, and the second one."""
    folder = tmp_path_factory.mktemp("averaged")
    keys: dict[str, Any] = {"batch": 6, "ema": 0.5, "optimizer": MUON}
    source = write_data(folder / "data")
    half = small_config(source, folder / "run", **keys, parallel=FSDP, schedule__stop=3)
    with connected_ranks(folder) as ranks:
        assert [outcome.error for outcome in ranks(2, run(half))] == ["", ""]
    whole = small_config(source, folder / "run", **keys, keep=2)
    train(whole, quiet=True, resume=True)
    return Path(whole.output)
