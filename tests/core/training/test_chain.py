"""A chain of stages: each starts from the one before, and the chain continues wherever it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from janus_modular import ConfigError
from janus_modular.cli.app import app
from janus_modular.config import to_plain
from janus_modular.plugins import default_plugins
from janus_modular.training import run_chain
from janus_modular.training.chain import load_stages
from janus_modular.training.engine import Engine
from janus_modular.training.train import train
from janus_modular.weights.files import open_weights

from .conftest import Make, Rank

STAGE_1 = ["understanding.adaptor", "generation.adaptor", "generation.embedding", "generation.head"]


@pytest.fixture
def chain(make: Make, tmp_path: Path) -> Path:
    """A file with two stages of three steps, into runs/."""
    first = to_plain(make(learn=STAGE_1, schedule={"steps": 3}, batch=6, checkpoint_every=2))
    second = {
        **first,
        "learn": ["understanding.adaptor", "backbone"],
        "model": None,
        "init": "none",
        "seed": 1,
    }
    for name, stage in {"one": first, "two": second}.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(stage), "utf-8")
    files = [str(tmp_path / f"{name}.yaml") for name in ("one", "two")]
    whole = {"chain": files, "output": str(tmp_path / "runs")}
    (file := tmp_path / "both.yaml").write_text(json.dumps(whole))
    return file


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, words), "--quiet"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in open_weights(folder).items()}


def test_stages_start_from_the_stage_before(chain: Path, tmp_path: Path):
    """As if each had been started alone."""
    result = run(chain)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(tmp_path / "runs/two/model")]
    assert run(tmp_path / "one.yaml", f"output={tmp_path / 'alone/one'}").exit_code == 0
    init = tmp_path / "alone/one/model"
    assert run(tmp_path / "two.yaml", f"init={init}", f"output={tmp_path / 'alone/two'}").exit_code == 0
    for name in ("one", "two"):
        got, want = (weights(tmp_path / folder / name / "model") for folder in ("runs", "alone"))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [("one", 1), pytest.param(("two", 2), marks=pytest.mark.slow)], ids=str)
def test_a_chain_continues_where_it_was_stopped(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, int]
):
    assert run(chain).exit_code == 0
    whole = weights(tmp_path / "runs/two/model")
    name, step = stop
    forward = Engine.step

    def interrupted(engine: Any, batch: Any) -> Any:
        trains_backbone = any(key.startswith("backbone") for key in engine.trainable)
        if trains_backbone == (name == "two") and engine.next_step == step:
            raise OSError("unplugged")
        return forward(engine, batch)

    output = f"output={tmp_path / 'again'}"
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", interrupted)
        assert run(chain, output).exit_code == 2
    refused = run(chain, output)
    assert refused.exit_code == 2
    assert "continue it with --resume" in refused.stderr
    done = run(chain, output, "--resume")
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(weights(tmp_path / "again/two/model"), whole, rtol=0, atol=0)
    finished = run(chain, output, "--resume")
    assert (finished.exit_code, finished.stdout.split()) == (0, [str(tmp_path / "again/two/model")])
    changed = run(chain, output, "one.seed=7", "--resume")
    assert changed.exit_code == 2
    assert "seed: 0 then, 7 now" in changed.stderr


def test_overrides_reach_the_stage_that_they_name(chain: Path, tmp_path: Path):
    stages = load_stages(str(chain), ["two.batch=12", "one.schedule.steps=9"], default_plugins())
    assert stages is not None
    assert [config.batch for config in stages.values()] == [6, 12]
    assert [config.schedule.steps for config in stages.values()] == [9, 3]
    assert stages["two"].init == str(tmp_path / "runs/one/model")


def test_the_published_chains_are_valid():
    for name in ("train/janus", "train/janus_pro"):
        stages = load_stages(name, ["stage2.batch=8"], default_plugins())
        assert stages is not None
        assert [*stages] == ["stage1", "stage2", "stage3"]
        assert stages["stage3"].init == f"{stages['stage2'].output}/model"


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"chain": []}, [], "chain: found none"),
        (
            {"chain": ["a/x.yaml", "b/x.yaml"]},
            [],
            "found x, x; expected training configs with different names",
        ),
        (
            {"chain": ["train/janus/stage1", "train/janus/stage3"]},
            [],
            "stage3: init is .*stage2.*expected .*stage1",
        ),
        (
            {"chain": ["train/janus/stage1", "train/janus/stage2"], "output": "runs/x"},
            ["stage2.model=tiny"],
            r"stage2 .*found `model`; expected none.* stage2\.model=null",
        ),
        ({"chain": ["train/janus/stage1"]}, ["stage1.batch=0"], r"(?s)stage1 .*batch: 0"),
        ({"chain": ["train/janus/stage1"]}, ["stage2.batch=1"], "stage2"),
        ({"chain": ["train/janus/stage1"]}, ["stage1=1"], "stage1"),  # a whole stage: no setting of it
        ({"chain": ["model/tiny"]}, [], "this is a model config"),
        ({"chain": ["missing.yaml"]}, [], "there is no config 'missing.yaml'"),
    ],
)
def test_chains_that_cannot_run_are_errors(tmp_path: Path, content: Any, overrides: list[str], message: str):
    (file := tmp_path / "chain.yaml").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        load_stages(str(file), overrides, default_plugins())
    assert CliRunner().invoke(app, ["config", "validate", str(file), *overrides]).exit_code == 2


def test_a_setting_of_training_configs_changes_every_stage_but_those_with_their_own(tmp_path: Path):
    chain = {"chain": ["train/janus/stage1", "train/janus/stage2"], "output": "runs/x"}
    (file := tmp_path / "chain.yaml").write_text(json.dumps(chain))
    overrides = ["stage2.batch=12", "dtype=bfloat16", "batch=6", "optimizer.lr=7e-5"]
    stages = load_stages(str(file), overrides, default_plugins())
    assert stages is not None
    assert [(stage.dtype, stage.batch, stage.optimizer.lr) for stage in stages.values()] == [
        ("bfloat16", 6, 7e-5),
        ("bfloat16", 12, 7e-5),
    ]


def test_there_is_nothing_to_resume_before_a_chain_was_started(chain: Path):
    result = run(chain, "--resume")
    assert result.exit_code == 2
    assert "no stage has a checkpoint" in result.stderr


def test_a_dry_run_describes_each_stage(chain: Path):
    result = CliRunner().invoke(app, ["train", str(chain), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Parameters") == 2
    validated = CliRunner().invoke(app, ["config", "validate", str(chain)])
    assert [line for line in validated.stdout.splitlines() if "is valid" in line] == [
        f"{chain}, one is valid.",
        f"{chain}, two is valid.",
    ]


@pytest.mark.slow
def test_several_processes_train_a_chain(chain: Path, ranks: Callable[..., list[Rank]], tmp_path: Path):
    def both(rank: int) -> str:
        stages = load_stages(str(chain), [], default_plugins())
        assert stages is not None
        return str(run_chain.train_chain(stages, resume=False, quiet=True, plugins=default_plugins()))

    outcomes = ranks(2, both)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    alone = load_stages(str(chain), [f"output={tmp_path / 'alone'}"], default_plugins())
    assert alone is not None
    for config in alone.values():
        train(config, quiet=True)
    got, want = (weights(tmp_path / folder / "two/model") for folder in ("runs", "alone"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
