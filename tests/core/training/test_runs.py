"""The commands `runs`: their numbers are those of a run's files, which they leave as they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from janus_modular import TrainingError
from janus_modular.cli.app import app
from janus_modular.config import to_plain
from janus_modular.locking import is_locked
from janus_modular.training.run_folder import run_folder
from janus_modular.training.run_record import Run, read_metrics

from .conftest import logged, small_config


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, words)])


def as_json(*words: object) -> Any:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the two runs, to be changed."""
    return shutil.copytree(trained, tmp_path / "runs")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def test_list_has_the_last_losses_of_every_run_below(trained: Path):
    second, first = as_json("list", trained)
    assert (first["run"], second["run"]) == (str(trained / "first"), str(trained / "deep/second"))
    values = logged(trained / "first")
    assert first["loss"] == values[6]["loss"]
    assert first["validation"] == {"drawn": values[6]["validation/drawn"]}
    assert (first["done"], first["steps"], first["state"]) == (6, 6, "finished")
    assert second["loss"] == logged(trained / "deep/second")[6]["loss"]
    table = call("list", trained).stdout
    assert f"{values[6]['loss']:.4f}  drawn {values[6]['validation/drawn']:.4f}" in table
    assert "vit, vq, hf" in table


def test_show_has_the_recorded_settings_metrics_and_validations(trained: Path):
    run = trained / "first"
    facts, values = as_json("show", run), logged(run)
    record = json.loads((run / "checkpoints/step-0000006/config.json").read_text())
    config = record["training"]["config"]
    assert facts["settings"] == {name: config[name] for name in facts["settings"]}
    assert facts["settings"].keys() >= {"learn", "mixture", "batch", "optimizer", "schedule", "parallel"}
    assert (facts["plugins"], facts["written_by"]) == (record["plugins"], record["written_by"])
    assert facts["checkpoints"] == ["step-0000003", "step-0000006"]
    assert facts["metrics"] == {"step": 6, **values[6]}
    assert [validation["step"] for validation in facts["validations"]] == [2, 4, 6]
    for validation in facts["validations"]:
        folder = run / f"validation/step-{validation['step']:07}"
        losses = {f"validation/{name}": value for name, value in validation["losses"].items()}
        assert losses == {k: v for k, v in values[validation["step"]].items() if k.startswith("validation")}
        assert losses
        assert validation["answers"] == json.loads((folder / "answers.json").read_text("utf-8"))
        assert validation["drawings"] == [str(folder / f"drawing-{i}.png") for i in range(2)]
    text = call("show", run).stdout
    for line in (
        "optimizer.lr +0.003",
        f"loss +{values[6]['loss']:.6g}",
        "image_tokenizers: vq +janus-modular",
    ):
        assert re.search(line, text), line


def test_compare_has_differing_settings_and_values_at_common_steps(trained: Path):
    first, second = trained / "first", trained / "deep/second"
    facts = as_json("compare", first, second)
    assert facts["settings"]["optimizer.lr"] == {str(first): 0.003, str(second): 0.001}
    assert facts["settings"]["log_every"] == {str(first): 1, str(second): 2}
    assert facts["settings"]["validation.sources.drawn.name"] == {str(first): "jsonl"}
    assert not {"output", "batch", "optimizer.clip"} & facts["settings"].keys()
    values = {run: logged(run) for run in (first, second)}
    for name in ("loss", "loss/image", "source/draw"):
        assert facts["metrics"][name] == {
            str(step): {str(run): values[run][step][name] for run in values} for step in (2, 4, 6)
        }
    assert facts["metrics"]["validation/drawn"] == {}
    text = call("compare", first, second, "--metric", "loss", "--rows", 2).stdout
    assert "loss (2 of 3 steps; all: --json)" in text
    a, b = (values[run][6]["loss"] for run in (first, second))
    assert re.search(f"^6 +{a:.6g} +{b:.6g}$", text, re.MULTILINE)
    assert re.findall(r"^\d+", text, re.MULTILINE) == ["2", "6"]
    assert "loss/image" not in text
    assert "validation/drawn: no step has a value in all" in call("compare", first, second).stdout


def test_nothing_is_written_into_runs(runs: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    before = contents(runs)
    first, second = runs / "first", runs / "deep/second"
    for words in (
        ("list", runs),
        ("show", first),
        ("compare", first, second),
        ("plot", first, second, "-o", tmp_path / "out.html"),
        ("plot", first, second, "-o", tmp_path / "out.png"),
    ):
        assert call(*words).exit_code == 0
    assert contents(runs) == before
    assert not [*runs.rglob(".lock")]


def test_a_run_inside_a_run_is_listed_too(runs: Path):
    shutil.copytree(runs / "deep/second", runs / "first/again")
    listed = [run["run"] for run in as_json("list", runs)]
    assert listed == [str(runs / name) for name in ("deep/second", "first", "first/again")]


def test_a_run_that_trains_now_can_be_inspected(runs: Path):
    first = runs / "first"
    for name in ("model", "checkpoints/step-0000006", "validation/step-0000006"):
        shutil.rmtree(first / name)
    lines = (first / "metrics.jsonl").read_text().splitlines(keepends=True)
    (first / "metrics.jsonl").write_text("".join(lines[:4]) + '{"step": 5, "loss": 2.')
    assert as_json("show", first)["state"] == "interrupted"
    with run_folder(first), run_folder(runs / "started"):
        assert as_json("show", runs / "started")["state"] == "running"
        assert is_locked(first / ".lock")
        before = contents(first)
        facts = as_json("show", first)
        assert contents(first) == before
        assert is_locked(first / ".lock")
    assert (facts["state"], facts["checkpoints"]) == ("running", ["step-0000003"])
    assert facts["done"] == facts["metrics"]["step"] == json.loads(lines[3])["step"]
    assert as_json("list", runs)[1]["steps"] == 6


def test_before_the_first_checkpoint_settings_are_unknown(runs: Path):
    first = runs / "first"
    shutil.rmtree(first / "model")
    shutil.rmtree(first / "checkpoints")
    assert as_json("show", first)["steps"] is None
    assert "settings and plugins are unknown before the first checkpoint" in call("show", first).stdout
    assert "6 of ?" in call("list", runs).stdout
    result = call("compare", first, runs / "deep/second")
    assert result.exit_code == 0
    assert f"{first}: settings are unknown" in result.stderr


def test_metrics_are_read_from_the_file_that_the_tracker_names(runs: Path):
    first = runs / "first"
    config = first / "checkpoints/step-0000006/config.json"
    record = json.loads(config.read_text())
    record["training"]["config"]["trackers"][0]["file"] = "lines.jsonl"
    config.write_text(json.dumps(record))
    values = logged(first)
    (first / "metrics.jsonl").rename(first / "lines.jsonl")
    assert as_json("show", first)["metrics"] == {"step": 6, **values[6]}


def damage_line(run: Path) -> Path:
    file = run / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": NaN}\n' + file.read_text())
    return file


def damage_answers(run: Path) -> Path:
    file = run / "validation/step-0000004/answers.json"
    file.write_text('[{"question": "Why?"}]')
    return file


def damage_config(run: Path) -> Path:
    file = run / "checkpoints/step-0000006/config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"training": {"step": 6, "config": {"schedule": []}}}))
    return file


def damage_image(run: Path) -> Path:
    file = run / "validation/step-0000004/drawing-1.png"
    file.write_bytes(file.read_bytes()[:60])
    return file


@pytest.mark.parametrize("damage", [damage_line, damage_answers, damage_config, damage_image])
def test_a_damaged_file_is_named(runs: Path, tmp_path: Path, damage: Callable[[Path], Path]):
    file = damage(runs / "first")
    result = call("plot", runs / "first", "-o", tmp_path / "out.html")
    assert result.exit_code == 2
    assert str(file) in result.stderr
    assert not (tmp_path / "out.html").exists()


def test_list_shows_a_damaged_run_beside_the_others(runs: Path):
    file = damage_config(runs / "first")
    result = call("list", runs, "--json")
    assert result.exit_code == 1
    second, first = json.loads(result.stdout)
    assert (first["state"], second["state"]) == ("damaged", "finished")
    assert str(file) in first["error"]
    assert str(file) in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"loss": 1}',
        '{"step": 1.5}',
        '{"step": 1, "loss": "a"}',
        '{"step": 1',
        '{"step": 1, "a": 1e999}',
        f'{{"step": 1, "a": 1{"0" * 400}}}',
    ],
)
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, line: str):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1, "loss": 2}}\n{line}\n')
    with pytest.raises(TrainingError, match=r"metrics\.jsonl, line 2: found"):
        read_metrics(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "missing"], "there is no folder missing"),
        (["show", "missing"], "missing is no folder; expected the output folder"),
        (["show", "."], "has neither checkpoints nor metrics"),
        (["compare", "runs/first"], "expected at least two"),
        (["compare", "runs/first", "runs/deep/../first"], "given twice"),
        (["compare", "runs/first", "runs/deep/second", "--metric", "los"], "Did you mean 'loss'"),
        (["plot", "runs/first", "-o", "out.svg"], "an .html or a .png"),
        (["plot", "runs/first", "-o", "missing/out.html"], "there is no folder 'missing'"),
    ],
)
def test_errors_say_what_was_expected(
    runs: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(runs.parent)
    result = CliRunner().invoke(app, ["runs", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr


def test_folders_without_runs_or_metrics_are_errors(tmp_path: Path):
    (tmp_path / "run/checkpoints/step-0000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/.lock").touch()  # of another program
    assert "has no runs" in call("list", tmp_path / "run/checkpoints").stdout
    result = call("plot", tmp_path / "run", "-o", tmp_path / "out.html")
    assert result.exit_code == 2
    assert "found no losses" in result.stderr


def test_commands_need_neither_torch_nor_matplotlib(trained: Path, tmp_path: Path):
    """All but a PNG, whose error names the extra."""
    first, second = str(trained / "first"), str(trained / "deep/second")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'matplotlib']))  # as if not installed\n"
        "from janus_modular.cli.app import app\n"
        f"for words in {[['list', str(trained)], ['show', first], ['compare', first, second]]}:\n"
        "    app(['runs', *words], standalone_mode=False)\n"
        f"app(['runs', 'plot', {first!r}, '-o', 'out.html'], standalone_mode=False)\n"
        f"app(['runs', 'plot', {first!r}, '-o', 'out.png'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "a PNG of 'runs plot' needs the extra 'plot': pip install 'janus-modular[plot]'" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.html"]


def test_settings_are_those_of_the_config(trained: Path):
    config = small_config(
        trained.parent / "data", trained / "deep/second", optimizer={"lr": 1e-3}, log_every=2
    )
    assert Run(trained / "deep/second").config == json.loads(json.dumps(to_plain(config)))
