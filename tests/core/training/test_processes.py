"""Training in several processes: the steps of one process, errors on all ranks, and no rank that hangs."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from janus_modular.errors import ConfigError
from janus_modular.plugins import default_plugins
from janus_modular.training import checkpoint_writer, run_folder
from janus_modular.training.dry_run import dry_run
from janus_modular.training.ema import read_averages
from janus_modular.training.engine import Engine
from janus_modular.training.initial_model import initial_model
from janus_modular.training.objective import step_losses
from janus_modular.training.parallel import checkpoint_activations, shard_components
from janus_modular.training.processes import Processes
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_batches import shared
from janus_modular.training.train import train
from janus_modular.training.trainable import set_trainable
from janus_modular.weights.files import open_weights

from .conftest import Make, Rank

Ranks = Callable[..., list[Rank]]

CPU = torch.device("cpu")
SLOW = pytest.mark.slow
LORA = {"backbone": {"name": "lora", "rank": 2}}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(config: TrainConfig, processes: Processes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the gradients of a first step by name, as numpy arrays or None, and its metrics."""
    plugins = default_plugins()
    torch.manual_seed(config.seed)
    with processes.started(CPU):
        assembly = initial_model(config, plugins, CPU)
        model = assembly.model
        set_trainable(model, config.learn)
        checkpoint_activations(model, config.activation_checkpointing)
        shard_components(model, config.parallel, device=CPU, world=processes.world, dtype=None)
        engine: Engine[Any] = Engine(
            model,
            lambda batch: step_losses(model, batch, CPU),
            config.optimizer,
            config.schedule,
            processes=processes,
        )
        builder = batch_builder(config, open_sources(config, plugins), model, assembly.processor, processes)
        is_sharded = "fsdp" in config.parallel.values()
        [batch] = shared(iter([builder.build(0)]), processes, equal_passes=is_sharded)
        metrics = engine._compute_gradients(batch)
        grads = {
            name: None if p.grad is None else whole(p.grad).numpy().copy()
            for name, p in engine.trainable.items()
        }
        return grads, {name: total / weight for name, (total, weight) in metrics.means.items()}


FSDP = {"backbone": "fsdp", "understanding.encoder": "fsdp"}
STAGE_1 = ["understanding.adaptor", "generation.adaptor", "generation.embedding", "generation.head"]


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({"batch": 6}, 2),
        pytest.param({"batch": 6}, 3, marks=SLOW),
        ({"batch": 6, "accumulate": 2}, 2),
        pytest.param({"batch": 6, "learn": STAGE_1}, 2, marks=SLOW),
        pytest.param({"batch": 4, "learn": ["understanding", "generation.head"]}, 2, marks=SLOW),
        ({"batch": 2, "mixture": {"draw": 1, "text": 1, "read": 0}}, 2),  # a rank draws, and another reads
        ({"batch": 2, "mixture": {"draw": 1, "read": 1, "text": 0}, "learn": STAGE_1}, 2),
        ({"batch": 2, "mixture": {"draw": 0, "read": 1, "text": 1}, "learn": STAGE_1}, 2),  # one has no loss
        pytest.param({"batch": 6, "length": "null"}, 2, marks=SLOW),
        ({"batch": 6, "activation_checkpointing": ["backbone"]}, 2),
        pytest.param({"batch": 6, "parallel": FSDP}, 2, marks=SLOW),
        ({"batch": 6, "parallel": FSDP, "accumulate": 2}, 3),
        pytest.param({"batch": 6, "parallel": FSDP, "activation_checkpointing": ["backbone"]}, 2, marks=SLOW),
        pytest.param({"batch": 6, "parallel": {"backbone": "fsdp"}, "learn": STAGE_1}, 2, marks=SLOW),
        ({"batch": 2, "parallel": FSDP, "mixture": {"draw": 1, "text": 1, "read": 0}}, 2),
        pytest.param(
            {"batch": 2, "parallel": FSDP, "mixture": {"draw": 1, "read": 1, "text": 0}, "learn": STAGE_1},
            2,
            marks=SLOW,
        ),
        ({"batch": 2, "parallel": FSDP, "mixture": {"draw": 0, "read": 1, "text": 1}, "learn": STAGE_1}, 2),
        pytest.param({"batch": 3, "parallel": FSDP, "accumulate": 2, "length": "null"}, 3, marks=SLOW),
    ],
)
def test_a_step_of_several_processes_is_that_of_one(make: Make, ranks: Ranks, changes: Any, world: int):
    config = make(**changes)
    want, want_metrics = gradients(config, Processes())
    want_metrics.pop("packing")
    outcomes = ranks(world, lambda rank: gradients(config, Processes.from_environment()))
    assert [outcome.error for outcome in outcomes] == [""] * world
    for outcome in outcomes:
        got, metrics = outcome.result
        assert 0 < metrics.pop("packing") <= 1  # each process packs its own rows
        assert metrics == pytest.approx(want_metrics, rel=1e-5)
        assert {name for name, x in got.items() if x is None} == {
            name for name, x in want.items() if x is None
        }
        for name, expected in want.items():
            if expected is not None:
                scale = max(np.abs(expected).max(), 1e-3)
                assert np.abs(got[name] - expected).max() <= 1e-6 * max(scale, 1), name


def run(config: TrainConfig, *, resume: bool = False) -> Callable[[int], str]:
    """Return an action that trains."""
    return lambda rank: str(train(config, quiet=True, resume=resume))


def losses(lines: list[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in lines]


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in open_weights(Path(config.output) / "model").items()}


@pytest.mark.parametrize("parallel", [{}, FSDP], ids=["ddp", "fsdp"])
def test_a_resumed_run_is_equal_to_the_bit(
    make: Make, ranks: Ranks, metrics: Any, tmp_path: Path, parallel: dict[str, str]
):
    """With both optimizers, and averages of the weights."""
    groups = {"backbone": {"name": "muon", "lr": 3e-3}}
    shared_keys: dict[str, Any] = {"batch": 6, "parallel": parallel, "ema": 0.8, "optimizer__groups": groups}
    whole = make(**shared_keys, checkpoint_every=3)
    assert [each.error for each in ranks(2, run(whole))] == ["", ""]
    halves = make(**shared_keys, output=str(tmp_path / "halves"), schedule__stop=3)
    assert [each.error for each in ranks(2, run(halves))] == ["", ""]
    halves = make(**shared_keys, output=str(tmp_path / "halves"), workers=2)
    assert [each.error for each in ranks(2, run(halves, resume=True))] == ["", ""]
    assert losses(metrics(whole)) == losses(metrics(halves))
    torch.testing.assert_close(weights(whole), weights(halves), rtol=0, atol=0)
    averages = [dict(read_averages(Path(c.output) / "checkpoints/step-0000006")) for c in (whole, halves)]
    torch.testing.assert_close(*averages, rtol=0, atol=0)


def test_an_unusable_sample_of_one_rank_ends_all_and_loses_nothing(make: Make, ranks: Ranks, data: Path):
    config = make(batch=6, schedule={"steps": 40})
    (data / "text.jsonl").write_text('{"text": "a"}\n' * 30 + '{"text": 3}\n', "utf-8")
    outcomes = ranks(2, run(config))
    own = [
        outcome.error for outcome in outcomes if "line 31" in outcome.error and "rank" not in outcome.error
    ]
    others = [outcome.error for outcome in outcomes if outcome.error.startswith("OtherRankError: rank ")]
    assert len(own) == len(others) == 1
    assert "line 31" in own[0]
    assert "line 31" in others[0]
    for error in (*own, *others):
        assert "before it are saved. Fix the cause, then resume from" in error
    newest = run_folder.newest_checkpoint(Path(config.output))
    assert newest is not None
    assert run_folder.resumable_checkpoints(Path(config.output)) == [newest]


def test_an_error_in_the_middle_of_a_step_ends_the_other_ranks(make: Make, ranks: Ranks):
    config = make(batch=6, checkpoint_every=2)

    def fail(rank: int) -> str:
        if rank == 1:
            step = Engine._forward

            def forward(engine: Any, batch: Any) -> Any:
                if engine.next_step == 3:
                    raise MemoryError("no room")
                return step(engine, batch)

            Engine._forward = forward  # type: ignore[method-assign]
        return str(train(config, quiet=True))

    other, failed = ranks(2, fail)
    assert failed.error.startswith("RankError: rank 1, step 3: out of memory (no room)")
    assert other.error.startswith("LostRankError: another process of the run has ended, and rank 0 with it")
    for outcome in (other, failed):
        assert "resume from" in outcome.error
        assert "step-0000002" in outcome.error
    newest = run_folder.newest_checkpoint(Path(config.output))
    assert newest is not None
    assert newest.name == "step-0000002"


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("killed", "parallel"),
    [
        pytest.param(0, {}, marks=SLOW),
        pytest.param(1, {}, marks=SLOW),
        pytest.param(0, FSDP, marks=SLOW),
        pytest.param(1, FSDP, marks=SLOW),
    ],
    ids=str,
)
def test_a_killed_rank_ends_the_others_and_the_run_is_resumed_to_the_bit(
    make: Make, ranks: Ranks, metrics: Any, tmp_path: Path, killed: int, parallel: dict[str, str]
):
    """Killed twice in a row: in a step, and while rank 0 writes a checkpoint."""
    shared_keys: dict[str, Any] = {"batch": 6, "parallel": parallel, "checkpoint_every": 2}
    whole = make(**shared_keys)
    assert [each.error for each in ranks(2, run(whole))] == ["", ""]
    config = make(**shared_keys, output=str(tmp_path / "killed"))

    def die_in_step(rank: int) -> None:
        step = Engine._forward

        def forward(engine: Any, batch: Any) -> Any:
            if rank == killed and engine.next_step == 3:
                die()
            return step(engine, batch)

        Engine._forward = forward  # type: ignore[method-assign]
        train(config, quiet=True)

    def die_in_save(rank: int) -> None:
        """Die while rank 0 writes: rank 0 after the weights, rank 1 where it waits for rank 0."""
        if rank == killed == 0:
            checkpoint_writer.write_share = die
        elif rank == killed:
            Processes.on_first = die  # type: ignore[method-assign]
        train(config, quiet=True, resume=True)

    for action in (die_in_step, die_in_save):
        outcomes = ranks(2, action)
        assert outcomes[killed].status == -signal.SIGKILL
        assert outcomes[1 - killed].status == 1
        assert "another process of the run has ended" in outcomes[1 - killed].error
    assert [each.error for each in ranks(2, run(config, resume=True))] == ["", ""]
    torch.testing.assert_close(weights(whole), weights(config), rtol=0, atol=0)


def test_adapters_of_a_sharded_backbone_train_as_in_one_process(make: Make, ranks: Ranks, tmp_path: Path):
    pytest.importorskip("peft")
    start = train(make(batch=6, schedule__stop=1, output=str(tmp_path / "start")), quiet=True)
    keys = {"model": "null", "init": str(start), "wrap": LORA, "learn": ["backbone"], "batch": 6}
    alone = make(**keys, output=str(tmp_path / "alone"))
    train(alone, quiet=True)
    sharded = make(**keys, output=str(tmp_path / "sharded"), parallel={"backbone": "fsdp"})
    assert [each.error for each in ranks(2, run(sharded))] == ["", ""]
    torch.testing.assert_close(weights(sharded), weights(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel": {"encoder": "fsdp"}},
            "parallel: found 'encoder', which is no component; expected u",
        ),
        ({"parallel": {"backbone": "zero3"}}, "parallel.backbone: found 'zero3'; expected ddp"),
        ({"parallel": {"generation.tokenizer": "fsdp"}}, "the image tokenizer is not called"),
        ({"activation_checkpointing": ["backbones"]}, "activation_checkpointing: found 'backbones'"),
        (
            {"optimizer": {"groups": {"head": {"lr": 1}}}},
            "optimizer.groups: 'head' fits no trained parameter",
        ),
    ],
)
def test_settings_of_components_are_checked(make: Make, changes: dict[str, Any], message: str):
    """Also in a single process, and in a dry run."""
    with pytest.raises(ConfigError, match=message):
        train(make(**changes), quiet=True)
    with pytest.raises(ConfigError, match=message):
        dry_run(make(**changes), default_plugins(), Console(quiet=True))


def test_a_signal_to_one_rank_stops_all_at_the_same_step(make: Make, ranks: Ranks, tmp_path: Path):
    config = make(batch=6, schedule={"steps": 50})

    def stop(rank: int) -> None:
        step = Engine.step

        def signalled(engine: Any, batch: Any) -> Any:
            if rank == 1 and engine.next_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(engine, batch)

        Engine.step = signalled  # type: ignore[method-assign]
        train(config, quiet=True)

    assert [outcome.error.split(":")[0] for outcome in ranks(2, stop)] == ["KeyboardInterrupt"] * 2
    newest = run_folder.newest_checkpoint(Path(config.output))
    assert newest is not None
    assert newest.name == "step-0000005"


def test_ranks_of_different_configurations_do_not_start(make: Make, ranks: Ranks):
    outcomes = ranks(2, lambda rank: train(make(batch=6, seed=rank), quiet=True))
    for outcome in outcomes:
        assert outcome.error.startswith("TrainingError: the configuration differs: ")


def test_a_rank_that_does_not_see_the_checkpoint_names_it(make: Make, ranks: Ranks, tmp_path: Path):
    config = make(batch=6, schedule__stop=2)
    train(config, quiet=True)

    def moved(rank: int) -> None:
        if rank == 1:
            os.chdir("/")
        train(make(batch=6, output=os.path.relpath(config.output, tmp_path)), quiet=True, resume=True)

    os.chdir(tmp_path)
    first, second = ranks(2, moved)
    assert "rank 1 does not see" in second.error
    assert "expected output on a disk that all machines share" in second.error
    assert first.error.startswith("OtherRankError: rank 1: rank 1 does not see")


def test_two_runs_into_one_folder_are_refused_on_every_rank(make: Make, ranks: Ranks):
    from janus_modular.training.run_folder import run_folder

    config = make(batch=6)
    with run_folder(Path(config.output)):
        outcomes = ranks(2, run(config))
    assert "another process" in outcomes[0].error
    assert outcomes[1].error.startswith("OtherRankError: rank 0: ")


def test_processes_connect_again_for_each_run(ranks: Ranks):
    """Also while the group of the run before still exists, as its model refers to it."""

    def connect(rank: int) -> list[list[tuple[int, int]]]:
        processes, groups, gathered = Processes.from_environment(), [], []
        for number in range(10):
            with processes.started(CPU):
                groups.append(torch.distributed.group.WORLD)
                gathered.append(processes.gather((number, rank)))
        return gathered

    for outcome in ranks(2, connect, seconds=30):
        assert outcome.result == [[(number, 0), (number, 1)] for number in range(10)], outcome.error


@pytest.mark.usefixtures("garbage_with_threads")
def test_a_rank_does_not_wait_for_threads_of_earlier_tests(ranks: Ranks):
    assert [outcome.error for outcome in ranks(2, lambda _: gc.collect(), seconds=30)] == ["", ""]
