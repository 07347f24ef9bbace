"""Errors during a run: the finished steps are saved, and following the error's hint works."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from janus_modular import DataError, JanusError, TrainingError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.locking import locked
from janus_modular.model.model import JanusModel
from janus_modular.training.engine import Engine, scalar_losses
from janus_modular.training.resume import changed_settings
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig
from janus_modular.training.train import train

from .conftest import Make

BITWISE = {"rtol": 0, "atol": 0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(ModelAssembly.from_checkpoint(folder).model.state_dict())


def checkpoints(config: Any) -> list[str]:
    return sorted(path.name for path in (Path(config.output) / "checkpoints").glob("step-*"))


def failing_at(step: int, fail: Any) -> Any:
    """Return a forward pass that fails in one step, and whose loss is its own otherwise."""
    forward, calls = JanusModel.forward, []

    def failing(self: JanusModel, batch: Any) -> Any:
        calls.append(1)
        output = forward(self, batch)
        return fail(output) if len(calls) == step + 1 else output

    return failing


def poison(output: Any) -> Any:
    output.losses["text"] = output.losses["text"] * float("nan")
    return output


def raising(error: Exception) -> Any:
    def fail(output: Any) -> Any:
        raise error

    return fail


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of runs that nothing disturbed, by what they were made with."""
    return {}


@pytest.mark.parametrize(
    ("fail", "kind", "words"),
    [
        (poison, TrainingError, "step 3: not finite: loss"),
        (raising(MemoryError()), TrainingError, "step 3: out of memory .*Raise accumulate"),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried")), TrainingError, "out of memory"),
        (raising(ZeroDivisionError("of a plugin")), TrainingError, "step 3: ZeroDivisionError: of a plugin"),
        (raising(JanusError("a plugin's own words")), JanusError, "a plugin's own words"),
    ],
)
def test_an_error_saves_the_steps_before_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: Any, fail: Any, kind: Any, words: str
) -> None:
    """And the run that goes on from there is, to the bit, the one that was never disturbed."""
    config = make(schedule={"steps": 5}, optimizer__weight_decay=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(JanusModel, "forward", failing_at(3, fail))
        with pytest.raises(kind, match=words) as error:
            train(config, quiet=True)
    note = error.value.__notes__[-1]
    assert note.startswith("The 3 steps before it are saved.")
    assert "--resume" in note
    assert checkpoints(config) == ["step-0000003"]
    resumed = weights(train(config, quiet=True, resume=True))
    if not whole:
        undisturbed = make(
            schedule={"steps": 5}, optimizer__weight_decay=0.1, output=str(tmp_path / "undisturbed")
        )
        whole["weights"] = weights(train(undisturbed, quiet=True))
    torch.testing.assert_close(resumed, whole["weights"], **BITWISE)


def test_the_command_line_prints_what_was_saved_below_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        error = TrainingError("step 3: not finite.")
        error.add_note("The 3 steps before it are saved.")
        raise error

    monkeypatch.setattr("janus_modular.cli.info.gather", fail)
    done = CliRunner().invoke(app, ["info", "tiny"])
    assert (done.exit_code, done.stderr) == (2, "step 3: not finite.\nThe 3 steps before it are saved.\n")


def test_the_hint_of_a_too_long_sample_works(make: Make, data: Path) -> None:
    """With threads that prepare ahead: the error comes out of one of them."""
    text = [{"text": "short"}] * 5 + [{"text": "long " * 60}]
    (data / "text.jsonl").write_text("\n".join(map(json.dumps, text)))
    only = {"mixture": {"read": 0, "draw": 0, "text": 1}, "batch": 1, "workers": 2}
    with pytest.raises(DataError, match="raise length") as error:
        train(make(length=128, **only), quiet=True)
    done = int(error.value.__notes__[-1].split()[1])
    assert done > 0
    config = make(length=512, **only)
    assert checkpoints(config) == [f"step-{done:07}"]
    train(config, quiet=True, resume=True)


def test_a_tracker_that_fails_costs_no_step(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("janus_plugins.trackers.jsonl.JsonlTracker.log", lambda *_: {}["licence"])
        with pytest.raises(TrainingError, match=r"JsonlTracker: the metrics of step 2 .*licence") as error:
            train(make(log_every=2), quiet=True)
    assert "The 2 steps before it are saved" in error.value.__notes__[-1]
    train(make(trackers=[]), quiet=True, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("janus_plugins.trackers.jsonl.JsonlTracker.close", lambda *_: 1 / 0)
        with pytest.raises(TrainingError, match="ZeroDivisionError") as error:
            train(make(schedule={"steps": 7}), quiet=True, resume=True)
    assert "The 7 steps before it are saved" in error.value.__notes__[-1]


def test_a_single_step_is_written_in_the_singular(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JanusModel, "forward", failing_at(1, poison))
    with pytest.raises(TrainingError) as error:
        train(make(), quiet=True)
    assert "The 1 step before it is saved" in error.value.__notes__[-1]


def test_a_save_that_fails_does_not_hide_the_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the plugin's own save")

    monkeypatch.setattr(JanusModel, "forward", failing_at(2, poison))
    monkeypatch.setattr("janus_modular.training.checkpoint_writer.write_description", fail)
    with pytest.raises(TrainingError, match="step 2: not finite") as error:
        train(make(), quiet=True)
    assert (
        "The 2 steps before it could not be saved: RuntimeError: the plugin's own save"
        in (error.value.__notes__[-1])
    )


def test_an_error_in_the_first_step_reports_that_nothing_was_lost(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JanusModel, "forward", failing_at(0, poison))
    with pytest.raises(TrainingError) as error:
        train(make(), quiet=True)
    assert error.value.__notes__[-1] == "No step was done before it, so nothing was lost."


def test_weights_of_an_interrupted_update_are_not_saved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = torch.optim.AdamW.step, []

    def half(self: torch.optim.AdamW) -> None:
        calls.append(1)
        step(self)
        if len(calls) == 4:
            raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    config = make(checkpoint_every=2)
    with pytest.raises(TrainingError, match="out of memory") as error:
        train(config, quiet=True)
    assert "during an update" in error.value.__notes__[-1]
    assert "step-0000002 with --resume" in error.value.__notes__[-1]
    assert checkpoints(config) == ["step-0000002"]


@pytest.mark.parametrize("spoil", ["weights", "moments"])
def test_a_state_that_is_not_finite_is_not_saved(
    make: Make, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    step, calls = torch.optim.AdamW.step, []

    def spoiling(self: torch.optim.AdamW) -> None:
        calls.append(1)
        step(self)
        if len(calls) == 4:
            (parameter, *_) = self.param_groups[0]["params"]
            spoiled = parameter if spoil == "weights" else self.state[parameter]["exp_avg_sq"]
            with torch.no_grad():
                spoiled.view(-1)[-1] = float("inf")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spoiling)
        config = make(checkpoint_every=2, learn=["backbone"])
        with pytest.raises(TrainingError, match=r"after step 3, not finite: .*backbone\..*optimizer\.lr"):
            train(config, quiet=True)
    assert checkpoints(config) == ["step-0000002"]
    train(make(learn=["backbone"], optimizer__lr=1e-4), quiet=True, resume=True)


class Noisy(torch.nn.Module):
    """Draws chance and keeps running statistics before its loss is found wanting."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
        self.spoil: Callable[[torch.Tensor], torch.Tensor] = lambda _: torch.zeros(())

    def losses(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = torch.nn.functional.dropout(self.norm(self.linear(batch))).square().mean()
        return {"square": loss + self.spoil(self.linear.weight)}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda _: torch.tensor(float("nan")), "loss"),
        (lambda weight: (weight.sum() * 1e30).square(), "loss"),
        (lambda weight: (0 * weight).sum().sqrt(), "grad_norm"),  # the loss is 0, its gradient is none
        (lambda weight: 1e25 * weight.sum(), "grad_norm"),  # its square is infinite
    ],
)
def test_a_failed_step_changes_no_state(spoil: Any, words: str) -> None:
    """Neither in statistics nor in random states, weights or moments."""
    module = Noisy()
    engine = Engine(module, scalar_losses(module.losses), OptimizerConfig(clip=None), ScheduleConfig(steps=9))
    engine.step(torch.randn(8, 4))
    batch = torch.randn(8, 4)
    before = {**{k: v.clone() for k, v in module.state_dict().items()}, "random": torch.get_rng_state()}
    module.spoil = spoil
    with pytest.raises(TrainingError, match=f"not finite: .*{words}"):
        engine.step(batch)
    after = {**module.state_dict(), "random": torch.get_rng_state()}
    torch.testing.assert_close(after, before, **BITWISE)
    assert (engine.next_step, engine.consistent) == (1, True)


# What may differ when a run goes on, and what may not.

REPAIRS = {
    "optimizer__lr": 1e-4,
    "optimizer__betas": [0.8, 0.9],
    "optimizer__weight_decay": 0.2,
    "optimizer__clip": 0.5,
    "schedule__warmup": 4,
    "length": 300,
    "accumulate": 2,
    "condition_dropout": 0.5,
    "supervise": "all",
    "sources__read__questions": ["Which colour?"],
}


def test_changeable_settings_are_accepted_and_printed(make: Make, capsys: Any) -> None:
    train(make(schedule__stop=2), quiet=True)
    train(make(schedule__stop=3, **REPAIRS), quiet=True, resume=True)
    output = capsys.readouterr().err
    for key, value in REPAIRS.items():
        assert any(line.startswith(f"  {key.replace('__', '.')}: ") for line in output.splitlines()), key
        assert f"{value!r} now" in output
    record = json.loads((Path(make().output) / "checkpoints/step-0000003/config.json").read_text())
    assert record["training"]["config"]["optimizer"]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("key", "value"), [("weight_decay", 0.5), ("betas", (0.5, 0.5)), ("lr", 1e-5), ("clip", 1e-3)]
)
def test_a_changed_optimizer_setting_takes_effect(key: str, value: Any) -> None:
    """The state of an optimizer brings its settings along, and they are not those of now."""
    results = []
    for later in ({}, {key: value}):
        torch.manual_seed(0)
        module = Noisy()
        first = Engine(module, scalar_losses(module.losses), OptimizerConfig(), ScheduleConfig())
        first.step(torch.randn(8, 4))
        second = Engine(module, scalar_losses(module.losses), OptimizerConfig(**later), ScheduleConfig())
        second.load_state_dict(first.state_dict())
        second.step(torch.randn(8, 4))
        results.append(module.linear.weight.detach().clone())
    assert not torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 6}, r"batch: 5 then, 6 now .*raise accumulate"),
        ({"seed": 1}, r"seed: 0 then, 1 now"),
        ({"mixture": {"read": 2, "draw": 2, "text": 2}}, r"mixture\.text: 1 then, 2 now"),
        ({"learn": ["backbone"]}, r"learn: \[.*\] then, \['backbone'\] now"),
        ({"model__generation__height": 64}, r"model\.generation\.height: 32 then, 64 now"),
        ({"init": "elsewhere", "model": "null"}, r"init: None then, 'elsewhere' now"),
    ],
)
def test_fixed_settings_are_an_error_with_both_values(
    make: Make,
    change: dict[str, Any],
    words: str,
    tmp_path_factory: pytest.TempPathFactory,
    trained_once: Any,
) -> None:
    with pytest.raises(TrainingError, match=words):
        train(make(output=str(trained_once(make)), **change), quiet=True, resume=True)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the folder of a run of two steps, of the config as `make` makes it."""
    folder = tmp_path_factory.mktemp("once") / "run"

    def once(make: Make) -> Path:
        if not folder.exists():
            train(make(output=str(folder), schedule__stop=2), quiet=True)
        return folder

    return once


def test_options_of_a_source_may_change_and_its_name_may_not() -> None:
    source = {"name": "jsonl", "path": "x"}

    def accepted(**now: Any) -> list[bool]:
        return [
            change.is_allowed for change in changed_settings({"sources": {"a": source}}, {"sources": now})
        ]

    assert accepted(a={**source, "path": "y"}) == [True]
    assert accepted(a={**source, "name": "folder"}) == [False]
    assert not all(accepted(b=source))


def test_the_suggested_new_run_can_be_started(make: Make, tmp_path: Path) -> None:
    train(make(schedule__stop=1), quiet=True)
    with pytest.raises(TrainingError, match="start a new run from its weights: ") as error:
        train(make(seed=1), quiet=True, resume=True)
    words = str(error.value).rpartition(": ")[2].split()
    changes_of = dict(word.split("=") for word in words) | {"output": str(tmp_path / "other"), "seed": 1}
    train(make(schedule__stop=1, **changes_of), quiet=True)


# One process, and one folder.


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_one_process_of_a_launcher_trains_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    train(make(schedule__stop=1), quiet=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
def test_a_locked_folder_is_an_error(make: Make) -> None:
    config = make(schedule__stop=1)
    folder = Path(config.output)
    folder.mkdir()
    with (
        locked(folder / ".lock", folder),
        pytest.raises(TrainingError, match=rf"another process is writing .*run \(process {os.getpid()}\)"),
    ):
        train(config, quiet=True)
    train(config, quiet=True)
    assert not list(folder.rglob(".*"))


def test_a_run_that_cannot_start_leaves_no_folder(make: Make) -> None:
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(make(), quiet=True, resume=True)
    assert not Path(make().output).exists()
