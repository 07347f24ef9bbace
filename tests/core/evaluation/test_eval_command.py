"""The command `eval`: results.json and the table, errors before a model is loaded, the ledger's check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from janus_modular import Janus
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError
from janus_modular.evaluation.ledger import identity_of
from janus_modular.evaluation.schema import EvalConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "model"
    torch.manual_seed(0)
    save(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)), folder)
    return folder


def run_eval(*words: Any) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


def test_questions_give_a_table_and_results(model: Path, images: Path, tmp_path: Path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"image": "a.png", "question": "Colour?", "answer": "orange"}\n')
    words = (model, "eval/questions", f"path={file}", f"images={images}", "settings.max_tokens=3")
    done = run_eval(*words, "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["metrics"]["all"]["questions"] == 1
    assert record["settings"]["max_tokens"] == 3
    assert record["settings"]["temperature"] == 0
    assert record["model"]["path"] == str(model)
    assert record["versions"]["torch"] == torch.__version__
    again = json.loads(run_eval(*words, "-o", tmp_path / "out", "--quiet", "--json").stdout)
    assert {**again, "date": ""} == {**record, "date": ""}


def test_a_bad_file_is_an_error_before_the_model_is_loaded(tmp_path: Path):
    (tmp_path / "q.jsonl").write_text('{"image": "no.png", "question": "?", "answer": "x"}\n')
    done = run_eval("no/such/model", "eval/questions", f"path={tmp_path / 'q.jsonl'}", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "line 1: image: there is no file" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["path", "images"])
def test_data_that_is_not_there_is_named_by_its_field(field: str, tmp_path: Path):
    words = [f"path={tmp_path}", f"images={tmp_path}", f"{field}={tmp_path / 'none'}"]
    done = run_eval("no/such/model", "eval/pope", *words, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert f"{field}: there is no file or folder '{tmp_path / 'none'}'" in done.stderr
    assert f"Fetch it, and set {field}=PATH." in done.stderr


def test_a_ledger_is_checked(model: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    words = (model, "eval/t2i_compbench", f"path={tmp_path / 'prompts.txt'}", "n=2", "-o", tmp_path / "out")
    assert run_eval(*words, "--quiet").exit_code == 0
    done = run_eval(*words, "--check-ledger", "1")
    assert (done.exit_code, done.stdout) == (0, "2 images drawn again, 0 with other codes\n")
    ledger = tmp_path / "out/ledger.jsonl"
    header, first, second = map(json.loads, ledger.read_text().splitlines())
    second["codes_sha256"] = first["codes_sha256"]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in (header, first, second)))
    done = run_eval(*words, "--check-ledger", "1")
    assert done.exit_code == 1
    assert "a cat_000001.png: other codes" in done.stderr
    done = run_eval(*words, "--check-ledger", "1", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"images": 2, "differing": ["samples/a cat_000001.png"]}
    assert run_eval(*words, "--check-ledger", "0").exit_code == 2


def test_the_identity_of_a_model_changes_with_its_weights_and_dtype(model: Path, tmp_path: Path):
    identity = identity_of(Janus.from_pretrained(model), str(model), None)
    assert identity == identity_of(Janus.from_pretrained(model), str(model), None)
    assert (identity["dtype"], identity["runtime"], identity["variant"]) == ("float32", "torch", None)
    half = identity_of(Janus.from_pretrained(model, dtype="bfloat16"), str(model), None)
    assert half["dtype"] == "bfloat16"
    changed = Janus.from_pretrained(model)
    with torch.no_grad():
        next(changed.model.backbone.parameters()).flatten()[-1] += 1  # type: ignore[attr-defined]
    digests = {identity["sha256"], half["sha256"], identity_of(changed, str(model), None)["sha256"]}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["batch_size=0"], "batch_size: 0"),
        (["prompt=Say."], "expected {question} in it"),
        (["n=2"], "n: has no effect with evaluate: questions"),
        (["evaluate=wise", "n=2"], "n: 2; expected 1, as wise has it"),
        (["evaluate=wise", "prompt='{question}'"], "prompt: has no effect"),
        (["evaluate=reconstruction"], "settings: have no effect"),
        (["settings.numbers=[1]"], "settings.numbers: is set by the evaluation"),
        (["evaluate=vqa"], "evaluate"),
    ],
)
def test_invalid_configs(changes: list[str], message: str):
    with pytest.raises(ConfigError) as error:
        resolve(load("eval/questions", changes), EvalConfig)
    assert message in str(error.value)
