"""The script for GPUs runs on a CPU at tiny sizes, and says what it could not do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.slow
def test_every_phase_runs_on_a_cpu(tmp_path: Path) -> None:
    done = run("--size", "tiny", "--device", "cpu", "--out", tmp_path, "--minutes", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert {phase["outcome"] for phase in results["phases"]} == {"passed"}
    metrics = {phase["name"]: phase["metrics"] for phase in results["phases"]}
    assert "skipped" in metrics["tests on a GPU"]["tests"]
    assert metrics["training, stage 2"]["tokens/s"] > 0
    assert metrics["ONNX Runtime, fp32, batch of 8"]["per image, s"] > 0
    verified = metrics["bundles against their model"]
    assert verified == {f"{name} verified": "True" for name in ("fp32", "fp16", "bf16")}
    table = (tmp_path / "results.md").read_text("utf-8")
    assert "| training, stage 2 | tokens/s |" in table
    assert "failed" not in table


def test_phases_that_find_no_time_or_lack_their_input_are_listed(tmp_path: Path) -> None:
    only = ("--only", "ONNX Runtime, fp32, batch of 1")
    done = run("--size", "tiny", "--device", "cpu", "--out", tmp_path, "--minutes", "0.01", *only)
    assert done.returncode == 0
    phases = json.loads((tmp_path / "results.json").read_text("utf-8"))["phases"]
    assert [(phase["name"], phase["outcome"], phase["reason"]) for phase in phases] == [
        ("random weights", "not run", "no time was left"),
        ("export", "not run", "needs: random weights"),
        ("ONNX Runtime, fp32, batch of 1", "not run", "needs: export"),
    ]
    assert "- export: not run: needs: random weights" in (tmp_path / "results.md").read_text("utf-8")


def test_a_phase_that_does_not_exist_and_a_folder_without_wheels_are_errors(tmp_path: Path) -> None:
    cpu = ("--size", "tiny", "--device", "cpu", "--out", tmp_path / "out")
    done = run(*cpu, "--only", "sampling")
    assert done.returncode == 1
    assert "--only: found 'sampling'; expected one of: tests on a GPU, random weights," in done.stderr
    done = run(*cpu, "--wheels", tmp_path)
    assert done.returncode == 1
    assert "found no *.whl; expected those that --help lists" in done.stderr
