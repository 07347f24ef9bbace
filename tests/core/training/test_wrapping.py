"""Adapters around the backbone of a checkpoint: they learn, what they adapt stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from janus_modular import ConfigError, JanusError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.janus import Janus
from janus_modular.training.train import train

LORA = {"name": "lora", "rank": 2, "alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def first(make) -> Path:
    return train(make(schedule={"steps": 2}), quiet=True)


@pytest.fixture
def second(make, first: Path, tmp_path: Path):
    def build(**changes):
        usual = {"init": str(first), "output": str(tmp_path / "second"), "schedule": {"steps": 4}}
        return make(**{"model": "null", "learn": ["backbone"], "wrap": LORA, **usual, **changes})

    return build


def test_only_adapters_are_trained_and_can_be_merged(second, first: Path, tmp_path: Path) -> None:
    folder = train(second(), quiet=True)
    before, after = (dict(ModelAssembly.from_checkpoint(path).model.state_dict()) for path in (first, folder))
    adapters = {name for name in after if ".lora_" in name}
    assert len(adapters) == 2 * 2 * 2  # A and B of two projections in two layers
    assert all(after[name].abs().max() > 0 for name in adapters)
    kept = {
        name.replace("backbone.backbone.", "backbone.", 1).replace(".base_layer.", "."): name
        for name in after
    }
    for name, weight in before.items():
        torch.testing.assert_close(after[kept[name]], weight, rtol=0, atol=0)
    plain = tmp_path / "plain"
    done = CliRunner().invoke(app, ["convert", str(folder), str(plain), "--merge"])
    assert done.exit_code == 0, done.output
    adapted, folded = (Janus.from_pretrained(path, device="cpu") for path in (folder, plain))
    assert folded.model.config.backbone.name == "hf"
    assert folded.chat("Colour?", max_tokens=8) == adapted.chat("Colour?", max_tokens=8)


def test_a_resumed_run_keeps_its_wrapped_backbone(second, tmp_path: Path) -> None:
    whole = train(second(checkpoint_every=2), quiet=True)
    halves = {"output": str(tmp_path / "halves"), "checkpoint_every": 2}
    train(second(**halves, schedule={"steps": 4, "stop": 2}), quiet=True)
    resumed = train(second(**halves), quiet=True, resume=True)
    one, two = (dict(ModelAssembly.from_checkpoint(path).model.state_dict()) for path in (whole, resumed))
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        ("lora", "found 'lora'; expected a backbone with options"),
        ({"name": "hf"}, "'hf' wraps no other backbone; expected a backbone that wraps another"),
        ({"name": "lora", "backbone": {"name": "hf"}}, "'lora' sets 'backbone' itself"),
        ({"name": "lora", "rnk": 2}, r"wrap\.rnk: unknown key"),
        ({"name": "lora", "rank": 0}, "wrap.*rank: 0; expected at least 1"),
        ({"name": "lroa"}, "no backbone is called 'lroa'"),
        ({"rank": 2}, "expected a backbone with options"),
        (
            {**LORA, "target_modules": ["nothing"]},
            "wrap.*the backbone 'lora'.* cannot be built: .*adapts nothing",
        ),
    ],
)
def test_invalid_wraps_are_errors_before_weights_are_read(second, wrap, expected: str) -> None:
    with pytest.raises(JanusError, match=expected):
        train(second(wrap=wrap), quiet=True)


def test_a_second_wrap_is_an_error(second, make, tmp_path: Path) -> None:
    folder = train(second(), quiet=True)
    third = make(model="null", init=str(folder), learn=["backbone"], output=str(tmp_path / "third"))
    train(third, quiet=True)
    with pytest.raises(ConfigError, match=r"'lora' already\. Leave wrap out"):
        train(second(init=str(folder), output=str(tmp_path / "fourth")), quiet=True)
    with pytest.raises(ConfigError, match="wrap: wraps the backbone of init"):
        make(wrap=LORA)
