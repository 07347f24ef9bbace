"""How several processes start: launchers' variables, batches, devices, and what the command line prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from janus_modular import TrainingError
from janus_modular.cli.app import app
from janus_modular.config import to_plain
from janus_modular.errors import ConfigError
from janus_modular.training.processes import Processes
from janus_modular.training.train import train

from .conftest import Make

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, r"RANK=\(not set\), WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started several processes"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "Start one torchrun on each machine"),
    ],
)
def test_variables_of_launchers_are_checked(
    make: Make, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=message):
        train(make(), quiet=True)


def test_a_batch_that_cannot_be_divided_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(
        ConfigError, match=r"batch: 5 samples a step .* 4 processes; expected a multiple, 4 say"
    ):
        train(make(), quiet=True)


def test_one_gpu_is_not_for_all_processes():
    processes = Processes(rank=1, world=2, local_rank=1)
    with pytest.raises(ConfigError, match="device: found cuda:0 with 2 processes; expected auto or cuda"):
        processes.device(torch.device("cuda:0"), "cuda:0")
    assert processes.device(CPU, "auto") == CPU


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_the_first_process_alone_prints_that_the_run_stopped(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, count: int
):
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("janus_modular.training.train.train", stopped)
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    (file := tmp_path / "run.yaml").write_text(json.dumps(to_plain(make(batch=6))), "utf-8")
    result = CliRunner().invoke(app, ["train", str(file)])
    assert result.exit_code == 130, result.output
    assert result.stderr.count("stopped: nothing was saved yet") == count


@pytest.mark.slow
def test_torchrun_starts_a_run(make: Make, tmp_path: Path):
    """The real launcher, once; the other tests set its variables."""
    config = make(batch=6, schedule={"steps": 2})
    (file := tmp_path / "run.yaml").write_text(json.dumps(to_plain(config)), "utf-8")
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "janus_modular",
        "train",
    ]
    done = subprocess.run([*line, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{config.output}/model"]
    assert done.stderr.count("Parameters") == 1
    assert [line.split(":")[1] for line in done.stderr.splitlines() if ": step " in line] == [
        " step 1 of 2",
        " step 2 of 2",
    ]
