"""Components that break their declaration: a run names them, before its first step where shapes tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from janus_modular import ConfigError, TrainingError
from janus_modular.plugins import default_plugins
from janus_modular.training.dry_run import dry_run
from janus_modular.training.engine import NonFiniteLossError
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train

from .conftest import Make


@pytest.fixture
def wrong_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder of `tiny` returns a feature less than it declares."""
    encoder = default_plugins().entry("understanding_encoders", "vit").factory
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda self, pixels: forward(self, pixels)[..., 1:])


def validate(config: TrainConfig) -> None:
    from janus_modular.cli.config import _check_model

    _check_model(config)


@pytest.mark.usefixtures("wrong_dimension")
@pytest.mark.parametrize(
    "check",
    [
        validate,
        lambda config: dry_run(config, default_plugins(), Console()),
        lambda config: train(config, quiet=True),
    ],
    ids=["validate", "dry run", "run"],
)
def test_a_wrong_dimension_is_found_before_the_run(
    make: Make, check: Callable[[TrainConfig], object]
) -> None:
    config = make()
    with pytest.raises(
        ConfigError, match=r"encoder: the understanding encoder 'vit' of .* returns \(1,"
    ) as caught:
        check(config)
    assert "but declares (1, " in str(caught.value)
    assert not (Path(config.output) / "checkpoints").exists()


@pytest.mark.parametrize(
    ("slot", "name", "component"),
    [
        ("heads", "mlp", "generation.head"),
        ("backbones", "hf", "backbone"),
    ],
)
def test_an_error_of_a_step_names_the_component(
    make: Make, monkeypatch: pytest.MonkeyPatch, slot: str, name: str, component: str
) -> None:
    module = default_plugins().entry(slot, name).factory

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 cannot be multiplied")

    monkeypatch.setattr(module, "forward", fail)
    with pytest.raises(
        TrainingError, match=rf"RuntimeError: mat1 .* multiplied \(in {component} \({name}\)\)\."
    ):
        train(make(), quiet=True)


@pytest.mark.parametrize(
    ("slot", "name", "component"),
    [("understanding_encoders", "vit", "understanding.encoder"), ("heads", "mlp", "generation.head")],
)
def test_the_first_component_that_returns_nan_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, slot: str, name: str, component: str
) -> None:
    module = default_plugins().entry(slot, name).factory
    forward = module.forward

    def ruined(*arguments: Any, **options: Any) -> Any:
        return forward(*arguments, **options) * float("nan")

    monkeypatch.setattr(module, "forward", ruined)
    with pytest.raises(NonFiniteLossError, match="step 0: not finite: loss") as caught:
        train(make(), quiet=True)
    [note, _] = caught.value.__notes__
    assert f"The first component whose output is not finite is {component} ({name})." in note
