"""Early stopping: the step at which a run ends, also after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_modular import ConfigError
from janus_modular.plugins import default_plugins
from janus_modular.training.early_stop import EarlyStop
from janus_modular.training.run_chain import train_chain
from janus_modular.training.run_record import open_run
from janus_modular.training.train import train
from janus_modular.training.validation_schema import EarlyStopConfig

from .conftest import Make


def early(data: Path, **settings: Any) -> dict[str, Any]:
    drawn = {"name": "jsonl", "path": str(data / "draw.jsonl"), "task": "draw"}
    return {"every": 1, "sources": {"drawn": drawn}, "early_stop": {"source": "drawn", **settings}}


def test_patience_counts_validations_since_the_lowest_loss() -> None:
    state = EarlyStop(EarlyStopConfig("x", patience=2, min_delta=0.1))
    over = []
    for step, loss in enumerate([3.0, 2.0, 1.95, 1.5, 1.5, 1.41]):
        state.update(step, {"validation/x": loss})
        over.append(state.is_over)
    assert over == [False, False, False, False, False, True]
    assert (state.best, state.best_step) == (1.5, 3)
    again = EarlyStop(state.config)
    again.resume({"early_stop": state.to_dict()})
    assert again == state


@pytest.mark.parametrize(
    ("settings", "losses", "message"),
    [
        (
            {"patience": 1, "min_delta": 0.2},
            [0.9, 0.6, 0.5],
            "the loss of x was lowest after step 15 (0.5); 1 validation since step 10 (0.6) gave none that is"
            " lower by more than min_delta, 0.2",
        ),
        (
            {"patience": 2},
            [0.9, 0.6, 0.7, 0.6],
            "the loss of x was lowest after step 10 (0.6), and the 2 validations since gave no lower one",
        ),
    ],
)
def test_the_message_names_the_step_of_the_lowest_loss(
    settings: dict[str, Any], losses: list[float], message: str
) -> None:
    """Also where that is lower than the loss before by less than ``min_delta``, and after a resume."""
    state = EarlyStop(EarlyStopConfig("x", **settings))
    for number, loss in enumerate(losses, 1):
        state.update(5 * number, {"validation/x": loss})
    again = EarlyStop(state.config)
    again.resume({"early_stop": state.to_dict()})
    assert state.is_over
    assert str(state) == str(again) == f"stopped early: {message}"


def test_a_run_ends_early_and_counts_as_finished(make: Make, data: Path, metrics: Any) -> None:
    """No loss is lower by 100: the run ends after the first validation and two more."""
    config = make(validation=early(data, patience=2, min_delta=100))
    model = train(config, quiet=True)
    assert max(line["step"] for line in metrics(config)) == 3
    assert model.is_dir()
    run = open_run(Path(config.output))
    assert (run.state, run.done, run.checkpoints) == ("finished", 3, ["step-0000003"])
    train(config, quiet=True, resume=True)
    assert open_run(Path(config.output)).done == 3
    train_chain({"only": config}, resume=True, quiet=True, plugins=default_plugins())
    more = make(validation=early(data, patience=3, min_delta=100))
    train(more, quiet=True, resume=True)
    assert open_run(Path(config.output)).checkpoints[-1] == "step-0000004"


def test_an_interrupted_run_ends_at_the_same_step(make: Make, data: Path) -> None:
    keys = {"validation": early(data, patience=3, min_delta=100), "checkpoint_every": 1}
    train(make(**keys, schedule__stop=2), quiet=True)
    train(make(**keys), quiet=True, resume=True)
    assert open_run(Path(make().output)).checkpoints[-1] == "step-0000004"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"source": "other"}, "early_stop.source: found 'other'"), ({"patience": 0}, "patience 0")],
)
def test_settings_without_effect_are_errors(
    make: Make, data: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(validation=early(data, **settings))
