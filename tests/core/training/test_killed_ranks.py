"""Runs of several processes that are killed twice in a row, at random points: the result is the same."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_modular.training.checkpoint_writer import CheckpointWriter
from janus_modular.training.engine import Engine
from janus_modular.training.run_folder import LATEST, newest_checkpoint
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train
from janus_modular.weights.checksums import HashingFile, verify_checksums
from janus_modular.weights.files import open_weights
from janus_modular.weights.writing import is_checkpoint_file

from .conftest import Make, Rank

Ranks = Callable[..., list[Rank]]

FSDP = {"backbone": "fsdp", "understanding.encoder": "fsdp"}
DROPOUT = {"model__backbone__config__attention_dropout": 0.1}
"""Makes the losses depend on the random state of each process."""

POINTS = {"step": (Engine, "_forward"), "write": (HashingFile, "write"), "publish": (os, "rename")}
"""What a process is killed in: a forward pass, a write of a checkpoint's tensor, the renaming of folders."""


def counting(owner: Any, name: str, at: int | None) -> list[int]:
    """Count the calls of a function in a list of a single number; at the number ``at``, kill the process."""
    function, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, counted)
    return calls


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in open_weights(Path(config.output) / "model").items()}


def losses(config: TrainConfig) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 21))])
@pytest.mark.slow
def test_a_run_killed_twice_is_equal_to_the_bit(make: Make, ranks: Ranks, tmp_path: Path, seed: int) -> None:
    """First at any point, then while a checkpoint is written in the background; at the same world size."""
    rng = random.Random(seed)
    parallel = rng.choice([FSDP, {}]) if seed else FSDP
    shared: dict[str, Any] = {"batch": 6, "parallel": parallel, "checkpoint_every": 2, **DROPOUT}
    undisturbed = make(**shared)

    def count(rank: int) -> dict[str, int]:
        counters = {point: counting(*place, at=None) for point, place in POINTS.items()}
        train(undisturbed, quiet=True)
        return {point: calls[0] for point, calls in counters.items()}

    outcomes = ranks(2, count)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    config = make(**shared, output=str(tmp_path / "killed"), checkpoint_async=True)
    for number, point in enumerate([rng.choice([*POINTS]), "write"]):
        killed = 0 if point == "publish" else rng.randrange(2)  # rank 0 alone publishes
        calls = outcomes[killed].result[point]
        at = rng.randint(1, calls // (4 if number else 2))  # the first kill leaves a checkpoint to write

        def die(rank: int, killed: int = killed, point: str = point, at: int = at) -> None:
            if rank == killed:
                counting(*POINTS[point], at=at)
            train(config, quiet=True, resume=newest_checkpoint(Path(config.output)) is not None)

        ended = ranks(2, die)
        assert ended[killed].status == -signal.SIGKILL, (point, at, ended)
        assert ended[1 - killed].status == 1
        assert "another process of the run has ended" in ended[1 - killed].error
        if (checkpoint := newest_checkpoint(Path(config.output))) is not None:
            verify_checksums(checkpoint, is_checkpoint_file=is_checkpoint_file)
    resumes = newest_checkpoint(Path(config.output)) is not None
    assert [x.error for x in ranks(2, lambda _: str(train(config, quiet=True, resume=resumes)))] == ["", ""]
    assert losses(config) == losses(undisturbed)
    torch.testing.assert_close(weights(config), weights(undisturbed), rtol=0, atol=0)
    assert sorted(os.listdir(Path(config.output) / "checkpoints")) == [LATEST, "step-0000004", "step-0000006"]


@pytest.mark.slow
def test_a_checkpoint_in_the_background_is_that_of_its_step(
    make: Make, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on from a copy: the files do not change if each write waits for the next step."""
    at_once = make(batch=6, parallel=FSDP, checkpoint_every=2, keep=9)
    later = make(
        batch=6,
        parallel=FSDP,
        checkpoint_every=2,
        keep=9,
        output=str(tmp_path / "later"),
        checkpoint_async=True,
    )

    def both(rank: int) -> list[bool]:
        train(at_once, quiet=True)
        poll, states = CheckpointWriter.poll, []

        def polled(writer: CheckpointWriter) -> None:
            states.append(writer._pending is not None)
            poll(writer)

        CheckpointWriter.poll = polled  # type: ignore[method-assign]
        train(later, quiet=True)
        return states

    outcomes = ranks(2, both)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert [outcome.result[:3] for outcome in outcomes] == [[False, False, True]] * 2
    for step in ("step-0000002", "step-0000004", "step-0000006"):
        first, second = (Path(config.output) / "checkpoints" / step for config in (at_once, later))
        names = {path.name for path in first.glob("*.safetensors")}
        assert names == {path.name for path in second.glob("*.safetensors")}
        assert len(names) == 4  # weights and state of two processes
        for name in names:
            assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_in_two_one_and_three_processes(make: Make, ranks: Ranks, tmp_path: Path) -> None:
    """The samples are the same, in the same order; losses differ by the rounding of sums."""
    alone = make(batch=6)
    train(alone, quiet=True)
    for world, stop, parallel in ((2, 2, FSDP), (1, 3, {}), (3, 5, FSDP), (2, 6, {})):
        changes = {
            "schedule__stop": stop,
            "parallel": parallel,
            "checkpoint_async": True,
            "checkpoint_every": 1,
        }
        config = make(batch=6, output=str(tmp_path / "moved"), **changes)
        ended = ranks(
            world, lambda _, config=config: str(train(config, quiet=True, resume=config.schedule.stop > 2))
        )
        assert [outcome.error for outcome in ended] == [""] * world
    assert losses(config) == pytest.approx(losses(alone), rel=1e-6, abs=1e-6)
    lines = [(Path(run.output) / "metrics.jsonl").read_text().splitlines() for run in (config, alone)]
    tokens = [[json.loads(line)["tokens"] for line in of_run] for of_run in lines]
    assert tokens[0] == tokens[1]
