"""Plugins loaded in child processes: built-in plugins in one process, broken plugins in separate ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.plugins import EntryPointInfo, Plugins
from janus_modular.plugins.probe import probe_all, probe_together


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests of the child processes that are started."""
    started: list[str] = []
    run = subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        started.append(command[3])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)  # check_output calls it too
    return started


def of(plugins: Plugins, *names: str) -> list[EntryPointInfo]:
    return [info for info in plugins.entry_points if info.name in names and info.slot == "adaptors"]


def test_built_in_plugins_share_a_process(plugins: Plugins, processes: list[str]) -> None:
    infos = of(plugins, "mlp", "linear", "identity")
    reports = list(probe_all(infos, known=plugins.entry_points))
    assert [report.registers for report in reports] == [["identity"], ["linear"], ["mlp"]]
    assert all(report.state == "ok" and report.where and report.doc for report in reports)
    assert len(processes) == 1


@pytest.fixture
def odd(plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], EntryPointInfo]:
    """Return a function that makes a built-in adaptor of a module's source."""

    def write(source: str) -> EntryPointInfo:
        (tmp_path / "odd_adaptor.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return replace(of(plugins, "mlp")[0], module="odd_adaptor")

    return write


@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("import os; os._exit(3)", "broken"),
        pytest.param(
            "print('hello')\nfrom janus_plugins.adaptors.mlp import *\n", "ok", marks=pytest.mark.slow
        ),
    ],
    ids=["crash", "output"],
)
def test_each_is_loaded_alone_where_one_of_them_crashes_or_prints(
    plugins: Plugins, odd: Callable[[str], EntryPointInfo], source: str, state: str
) -> None:
    infos = [odd(source), *of(plugins, "linear")]
    assert probe_together(infos, timeout=300) == {}
    reports = list(probe_all(infos, known=infos))
    assert [report.state for report in reports] == [state, "ok"]
    assert reports[1].output == ""


def test_one_that_hangs_does_not_hang_the_others(
    plugins: Plugins, odd: Callable[[str], EntryPointInfo]
) -> None:
    hanging = odd("import time; time.sleep(600)")
    assert probe_together([hanging, *of(plugins, "linear")], timeout=2) == {}


def test_doctor_examines_a_single_component(processes: list[str]) -> None:
    done = CliRunner().invoke(app, ["plugins", "doctor", "adaptors:mlp", "--json"])
    assert [(item["slot"], item["name"]) for item in json.loads(done.stdout)] == [("adaptors", "mlp")]
    assert len(processes) == 1
    unknown = CliRunner().invoke(app, ["plugins", "doctor", "mpl"])
    assert (unknown.exit_code, "no component is called 'mpl'. Did you mean 'mlp'" in unknown.stderr) == (
        2,
        True,
    )
