"""Evaluation of a bundle: its identity in the ledger, answers, drawings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from janus_modular import Janus
from janus_modular.cli.app import app
from janus_modular.evaluation.ledger import identity_of


def test_the_identity_of_a_bundle_is_that_of_its_variant(tiny_bundle: Path):
    identities = {
        variant: identity_of(Janus.from_pretrained(tiny_bundle, variant=variant), str(tiny_bundle), None)
        for variant in ("fp32", "cpu-int4")
    }
    assert {name: identity["variant"] for name, identity in identities.items()} == {
        "fp32": "fp32",
        "cpu-int4": "cpu-int4",
    }
    assert identities["fp32"]["sha256"] != identities["cpu-int4"]["sha256"]
    assert identities["fp32"]["runtime"] == "onnx"


@pytest.mark.parametrize("suite", ["eval/questions", "eval/wise"])
def test_a_bundle_is_evaluated(suite: str, tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "wise.json").write_text('[{"prompt_id": 1, "Prompt": "a cat"}]')
    (tmp_path / "questions.jsonl").write_text('{"images": [], "question": "What?", "answer": "x"}\n')
    file = tmp_path / ("wise.json" if suite == "eval/wise" else "questions.jsonl")
    words = [str(tiny_bundle), suite, f"path={file}", "--variant", "cpu-int8", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["eval", *words, "--quiet"])
    assert done.exit_code == 0, done.output
    header, line = map(json.loads, (tmp_path / "out/ledger.jsonl").read_text().splitlines())
    assert header["model"]["variant"] == "cpu-int8"
    assert json.loads((tmp_path / "out/results.json").read_text())["model"]["runtime"] == "onnx"
    if suite == "eval/wise":
        assert (line["variant"], line["runtime"], line["dtype"]) == ("cpu-int8", "onnx", None)
        again = CliRunner().invoke(app, ["eval", *words, "--check-ledger", "1"])
        assert again.stdout == "1 images drawn again, 0 with other codes\n"


def test_reconstruction_needs_a_checkpoint(tiny_bundle: Path, tmp_path: Path):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    done = CliRunner().invoke(
        app,
        ["eval", str(tiny_bundle), "eval/reconstruction", f"path={tmp_path}", "-o", str(tmp_path / "out")],
    )
    assert done.exit_code == 2
    assert "Load the checkpoint" in done.stderr
