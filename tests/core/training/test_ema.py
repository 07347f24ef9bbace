"""Averages of the weights: their values, exact resumption, validation and conversion; sharded with Muon."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from janus_modular import CheckpointError
from janus_modular.checkpoints import convert
from janus_modular.training.ema import WeightAverages, read_averages
from janus_modular.training.engine import Engine, scalar_losses
from janus_modular.training.processes import Processes
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig
from janus_modular.training.train import train
from janus_modular.weights.files import open_weights

from .conftest import Make, Rank

MUON = {"lr": 3e-3, "groups": {"backbone": {"name": "muon", "lr": 3e-3}}}


def newest(run: str, step: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{step:07}"


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 3))])
def test_averages_are_those_of_the_saved_weights(
    make: Make, ranks: Callable[..., list[Rank]], world: int
) -> None:
    """Recomputed in float64 from the weights of each step, also of sharded components.

    1e-6 is float32's rounding of some updates.
    """
    parallel = {"backbone": "fsdp", "understanding.encoder": "fsdp"} if world > 1 else {}
    keys: dict[str, Any] = {"batch": 6, "ema": 0.8, "optimizer": MUON, "parallel": parallel}
    config = make(**keys, checkpoint_every=1, keep=9, schedule__steps=3)
    if world == 1:
        train(config, quiet=True)
    else:
        outcomes = ranks(world, lambda rank: str(train(config, quiet=True)))
        assert [outcome.error for outcome in outcomes] == [""] * world
    averages, first = (read_averages(newest(config.output, step)) for step in (3, 1))
    steps = [open_weights(newest(config.output, step)) for step in (1, 2, 3)]
    for name, average in averages.items():
        expected = first[name].double()
        for weights in steps[1:]:
            expected = 0.8 * expected + 0.2 * weights[name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    name = "backbone.model.model.norm.weight"
    assert not torch.equal(averages[name], steps[-1][name])


def test_muon_of_sharded_matrices_is_that_of_whole_ones(ranks: Callable[..., list[Rank]]) -> None:
    """A shard alone would be orthogonalised differently.

    Muon computes its update in bfloat16: of a learning rate of 0.1, scaled by 0.2 * sqrt(6), 2e-3 is 4 %,
    five roundings of 2**-7.
    """
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    x, target = torch.randn(8, 4), torch.randn(8, 4)

    def weight_after_a_step(processes: Processes) -> Any:
        with processes.started(torch.device("cpu")):
            module = deepcopy(start)
            if processes.world > 1:
                fully_shard(module)
            engine = Engine(
                module,
                scalar_losses(lambda x: {"square": (module(x) - target).square().mean()}),
                OptimizerConfig(lr=0.1, clip=None, groups={"0": {"name": "muon"}}),
                ScheduleConfig(steps=1),
                processes=processes,
            )
            engine.step(x)
            weight = module[0].weight.detach()
            return (weight.full_tensor() if isinstance(weight, DTensor) else weight).numpy().copy()

    expected = weight_after_a_step(Processes())
    for outcome in ranks(2, lambda rank: weight_after_a_step(Processes.from_environment())):
        assert not outcome.error
        np.testing.assert_allclose(outcome.result, expected, rtol=0, atol=2e-3)
    assert abs(expected - start[0].weight.detach().numpy()).max() > 0.02


def test_the_first_average_starts_from_the_weights_of_the_start() -> None:
    learner = nn.Linear(2, 2)
    start = learner.weight.detach().clone()
    averages = WeightAverages(dict(learner.named_parameters()), 0.9)
    with torch.no_grad():
        learner.weight.add_(1)
    averages.update()
    torch.testing.assert_close(averages.averages["weight"], start + 0.1)
    changed = learner.weight.detach().clone()
    with averages.applied():
        torch.testing.assert_close(learner.weight, start + 0.1)
    assert torch.equal(learner.weight, changed)


def test_a_resumed_run_has_the_same_averages_to_the_bit(make: Make, tmp_path: Path) -> None:
    whole = make(ema=0.9, optimizer=MUON)
    train(whole, quiet=True)
    halves = {"ema": 0.9, "optimizer": MUON, "output": str(tmp_path / "halves")}
    train(make(**halves, schedule__stop=3), quiet=True)
    train(make(**halves), quiet=True, resume=True)
    expected, averages = (read_averages(newest(run, 6)) for run in (whole.output, halves["output"]))
    assert expected.keys() == averages.keys()
    for name in expected:
        assert torch.equal(expected[name], averages[name]), name


def test_averages_that_are_added_at_a_resume_start_from_its_weights(make: Make) -> None:
    train(make(schedule__stop=3), quiet=True)
    train(make(ema=0.9, schedule__stop=3), quiet=True, resume=True)
    train(make(ema=0.9, schedule__stop=4), quiet=True, resume=True)
    before, after = (open_weights(newest(make().output, step)) for step in (3, 4))
    for name, average in read_averages(newest(make().output, 4)).items():
        torch.testing.assert_close(average, before[name].lerp(after[name], 0.1), msg=name)


def test_averages_are_validated_and_converted(make: Make, metrics: Any, data: Path, tmp_path: Path) -> None:
    """A checkpoint that `convert --ema` writes has the losses that were logged."""
    drawn = {"name": "jsonl", "path": str(data / "draw.jsonl"), "task": "draw"}
    validation = {"every": 6, "sources": {"drawn": drawn}, "weights": "ema"}
    config = make(ema=0.5, validation=validation)
    train(config, quiet=True)
    source, target = newest(config.output, 6), tmp_path / "averaged"
    convert(source, target, replacements=read_averages(source))
    averaged = make(
        model="null",
        init=str(target),
        output=str(tmp_path / "again"),
        validation=validation | {"weights": "trained", "every": 1},
        schedule={"steps": 1},
        optimizer__lr=1e-30,
    )
    train(averaged, quiet=True)
    [logged], [again] = (
        [line["validation/drawn"] for line in metrics(c) if "validation/drawn" in line]
        for c in (config, averaged)
    )
    assert again == pytest.approx(logged, rel=1e-6)  # the same computation, after an update of 1e-30
    trained = open_weights(source)
    different = [name for name, x in open_weights(target).items() if not torch.equal(x, trained[name])]
    assert {*different} <= {*read_averages(source)}
    assert len(different) > 10


def test_a_checkpoint_without_averages_says_so(make: Make) -> None:
    model = train(make(schedule__stop=1), quiet=True)
    with pytest.raises(CheckpointError, match="has no training state"):
        read_averages(model)
    with pytest.raises(CheckpointError, match="its run had no ema"):
        read_averages(newest(make().output, 1))


@pytest.mark.parametrize(
    ("changes", "message"), [({"ema": 1}, "ema: 1"), ({"validation": {"weights": "ema"}}, "set ema")]
)
def test_settings_without_effect_are_errors(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        make(**changes)
