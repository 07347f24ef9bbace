"""The demo in a few steps: everything runs, everything is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from janus_modular.config import load, resolve, to_plain
from janus_modular.errors import ConfigError, TrainingError
from janus_modular.janus import Janus
from janus_modular.locking import locked
from janus_modular.plugins import Plugins
from janus_modular.training.run_folder import LOCK
from janus_modular.training.schema import TrainConfig
from janus_plugins.demo import phases, post_training
from janus_plugins.demo.ablation import run_ablation, shared_config
from janus_plugins.demo.run import SETTINGS, run_demo
from janus_plugins.demo.schema import DemoConfig

METRICS = {
    "reading_accuracy",
    "drawing_accuracy",
    "drawing_accuracy_t1",
    "drawing_accuracy_t1_g1",
    "classifier_accuracy",
    "diversity_ratio",
    "nearest_ratio",
    "codes_used",
    "psnr_db",
    "seconds",
}


def demo(raw: dict[str, Any]) -> DemoConfig:
    return resolve(raw, DemoConfig)


@dataclass
class Section:
    title: str
    text: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    strips: dict[str, list[Image.Image]]
    metrics: dict[str, float]


def tidy(checkpoint: Path, output: Path, *, prompts: list[str], settings: dict[str, Any]) -> Section:
    """Put the model away."""
    assert len(prompts) == 10
    assert set(settings) == {"guidance", "temperature", "seed"}
    images = Janus.from_pretrained(checkpoint).draw(prompts[0], 2, **settings)
    return Section(
        "Put <away>", "It is safe.", ("what",), [("shelf & box",)], {"two": images}, {"shelves": 2}
    )


@pytest.fixture
def ran(quick: dict[str, Any], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    old = tmp_path / "demo" / "model" / "old.txt"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier demo")
    (tmp_path / "demo" / SETTINGS).touch()
    return tmp_path / "demo", run_demo(demo(quick), tmp_path / "demo", quiet=True, force=True)


def test_report(ran: tuple[Path, dict[str, Any]]) -> None:
    folder, returned = ran
    report = json.loads((folder / "report.json").read_text())
    assert report == returned
    assert {name for name in report if not name.startswith("settings.")} == METRICS
    assert report["settings.drawings.drawing_accuracy.guidance"] == 2
    assert not any(isinstance(value, dict) for value in report.values())

    page = (folder / "report.html").read_text("utf-8")
    links = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert links
    assert all(link.startswith("data:image/") for link in links)  # nothing beside it is needed
    assert "{{" not in page
    assert "Not from this run" in page  # drawings of a larger run, which the package has
    with Image.open(folder / "drawings.png") as grid:
        assert grid.width > 300
    Janus.from_pretrained(folder / "model").chat(
        "Which digit is this?", [folder / "example.png"], max_tokens=2
    )
    assert not (folder / "model" / "old.txt").exists()
    metrics = [json.loads(line) for line in (folder / "phases/stage2/metrics.jsonl").read_text().splitlines()]
    assert {"loss/text", "loss/image", "source/read", "source/draw", "source/text"} <= set(metrics[-1])

    # What stays is an ordinary checkpoint, with the parts in it that were trained on their own.
    janus = Janus.from_pretrained(folder / "model")
    assert janus.draw("Draw the digit three.", 2, guidance=2.0)[0].size == (32, 32)
    assert int(janus.model.get_submodule("generation.tokenizer").steps) == 2


@pytest.mark.slow
def test_post_training_steps_of_other_packages_run(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    points = EntryPoints([EntryPoint("tidy", f"{__name__}:tidy", post_training.GROUP)])
    monkeypatch.setattr(EntryPoint, "load", lambda point: tidy)
    monkeypatch.setattr(post_training, "entry_points", lambda group: points.select(group=group))
    quick["stages"].pop("stage2")
    with pytest.raises(ConfigError, match=r"no step is called 'tidi'. Did you mean 'tidy'\?"):
        run_demo(demo(quick | {"post_training_steps": ["tidi"]}), tmp_path / "demo", quiet=True)
    assert not (tmp_path / "demo").exists()
    report = run_demo(demo(quick | {"post_training_steps": ["tidy"]}), tmp_path / "demo")
    assert report["shelves"] == 2
    page = (tmp_path / "demo/report.html").read_text("utf-8")
    assert "Put &lt;away&gt;" in page
    assert "shelf &amp; box" in page
    assert "tidy: Put the model away." in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_demo_continues_to_the_same_result(
    quick: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_demo(demo(quick), tmp_path / "whole", quiet=True)
    trained: list[str] = []
    real_fit, real_train = phases.fit, phases.train

    def fit(*args: Any, title: str, **more: Any) -> Any:
        trained.append(title)
        if len(trained) == 1:
            raise KeyboardInterrupt
        return real_fit(*args, title=title, **more)

    def train(config: TrainConfig, *, title: str, **more: Any) -> Path:
        name = title.split()[-1]  # stage 1 of 4, tokenizer
        trained.append(name)
        if trained[-1] == trained[-2]:
            return real_train(config, title=title, **more)
        if name in ("encoder", "stage2"):  # interrupted after their first step; the others before it
            shutil.rmtree(real_train(replace(config, schedule=replace(config.schedule, stop=1)), **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(phases, "fit", fit)
    monkeypatch.setattr(phases, "train", train)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            run_demo(demo(quick), tmp_path / "demo", quiet=True)
    report = run_demo(demo(quick), tmp_path / "demo", quiet=True)
    names = ("classifier", "tokenizer", "encoder", "stage1", "stage2")
    assert trained == [name for name in names for _ in range(2)]
    assert report | {"seconds": 0} == whole | {"seconds": 0}

    trained.clear()
    assert run_demo(demo(quick), tmp_path / "demo", quiet=True) == report  # as it is, untouched
    with pytest.raises(
        TrainingError, match=r"has other settings: choose another --out FOLDER, or use --force"
    ):
        run_demo(demo(quick | {"seed": 1}), tmp_path / "demo", quiet=True)
    assert trained == []
    for other in (quick, quick | {"seed": 1}):  # from the start
        trained.clear()
        with pytest.raises(KeyboardInterrupt):
            run_demo(demo(other), tmp_path / "demo", quiet=True, force=True)
        assert trained == ["classifier"]


@pytest.mark.parametrize("name", ["file", "file/demo", "a" * 300])
def test_an_invalid_folder_is_an_error(name: str, quick: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot be written: .* Choose another --out FOLDER"):
        run_demo(demo(quick), tmp_path / name, quiet=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such lock")
@pytest.mark.parametrize("run", [run_demo, run_ablation])
def test_a_locked_folder_is_an_error(run: Callable[..., Any], quick: dict[str, Any], tmp_path: Path) -> None:
    config = demo(quick) if run is run_demo else quick
    with locked(tmp_path / LOCK, tmp_path), pytest.raises(TrainingError, match="another process is writing"):
        run(config, tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", [run_demo, run_ablation])
@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_are_an_error_before_anything_is_written(
    variable: str,
    run: Callable[..., Any],
    quick: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "2")
    with pytest.raises(TrainingError, match=f"{variable}=2"):
        run(demo(quick) if run is run_demo else quick, tmp_path / "demo", quiet=True)
    assert not (tmp_path / "demo").exists()


def test_a_folder_with_other_files_is_an_error(quick: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TrainingError, match="choose another --out"):
        run_demo(demo(quick), tmp_path, quiet=True)
    assert (tmp_path / "thesis.txt").is_file()


@pytest.mark.slow
def test_ablation(quick: dict[str, Any], tmp_path: Path) -> None:
    rows = run_ablation(quick, tmp_path / "ablation", seeds=1, quiet=True)
    assert json.loads((tmp_path / "ablation" / "ablation.json").read_text()) == rows
    assert {"decoupled_reading_accuracy", "shared_reading_accuracy", "reading_gain"} <= set(rows[0])
    one, other = (
        Janus.from_pretrained(tmp_path / f"ablation/seed0/{arm}/model") for arm in ("decoupled", "shared")
    )
    codes = [
        janus.model.get_submodule("generation.tokenizer").codebook_embeddings() for janus in (one, other)
    ]
    assert codes[0].equal(codes[1])  # one tokenizer, trained once
    assert other.model.get_submodule("understanding.encoder.tokenizer").codebook_embeddings().equal(codes[0])


def test_the_two_models_differ_in_the_encoder_alone(plugins: Plugins) -> None:
    raw = load("demo/digits")
    one, other = to_plain(resolve(raw, DemoConfig, plugins)), to_plain(shared_config(raw, plugins))
    assert one["model"]["understanding"].pop("encoder") != other["model"]["understanding"].pop("encoder")
    for name in ("tokenizer", "encoder"):
        assert one["stages"].pop(name)["objective"]
    assert one == other


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from janus_modular.cli.app import app

    monkeypatch.setenv("OMP_WAIT_POLICY", "active")

    seen: dict[str, Any] = {}
    monkeypatch.setattr("janus_plugins.demo.run.run_demo", lambda *args, **more: seen.update(run=args))
    monkeypatch.setattr(
        "janus_plugins.demo.ablation.run_ablation", lambda *args, **more: seen.update(ablation=more)
    )
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--seed", "3", "count=20"])
    assert result.exit_code == 0, result.output
    assert os.environ["OMP_WAIT_POLICY"] == "active"  # what the user has set stays
    monkeypatch.delenv("OMP_WAIT_POLICY")
    config, folder = seen["run"]
    assert (config.seed, config.count, folder) == (3, 20, tmp_path)
    assert CliRunner().invoke(app, ["demo", "ablation", "--seeds", "2"]).exit_code == 0
    assert seen["ablation"]["seeds"] == 2
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    wrong = CliRunner().invoke(app, ["demo", "classifier.schedule.stepz=3"])
    assert wrong.exit_code == 2
    assert "steps" in wrong.output
    nothing = CliRunner().invoke(app, ["demo", "count=0"])  # before anything is trained
    assert nothing.exit_code == 2
    assert "count 0, seed 0: expected at least 1" in nothing.output


def test_the_old_key_of_post_training_steps_is_an_error_with_the_new_name(quick: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="It is called 'post_training_steps' now"):
        demo(quick | {"finish": []})
