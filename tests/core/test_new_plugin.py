"""``plugins new``: what it writes works as written, for every slot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.errors import PluginError
from janus_modular.plugins.scaffold import CONTRACT_TESTS, TEMPLATE, slot_named, write_plugin
from janus_modular.registry import SLOTS, slot_label
from janus_modular.suggest import did_you_mean


def ran(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a plugin's folder; what was installed there is found."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def install(folder: Path) -> None:
    """Install a plugin into a folder of its own, offline, by the build backend that is here."""
    pip = ["-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    done = ran(folder, *pip, "--no-build-isolation", "--target", "site", ".")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_new_plugin_is_found_and_its_own_tests_pass(tmp_path: Path) -> None:
    """From a checkout; `test_third_party_packages.py` has one of every slot beside the wheel."""
    slot = "adaptors"
    files = write_plugin("acme-thing", slot, tmp_path)
    folder = tmp_path / "acme-thing"
    assert all((folder / file).is_file() for file in files)
    install(folder)

    listed = ran(folder, "-m", "janus_modular", "plugins", "show", f"{slot}:acme-thing")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert "acme-thing 0.1.0" in listed.stdout
    tested = ran(folder, "-m", "pytest", "-q", "-W", "error", "-m", "not slow", "-p", "no:cacheprovider")
    assert tested.returncode == 0, tested.stdout
    assert "failed" not in tested.stdout


@pytest.mark.parametrize("slot", SLOTS)
def test_a_new_plugin_is_in_the_style_of_the_house(tmp_path: Path, slot: str) -> None:
    write_plugin("acme-thing", slot, tmp_path)
    folder = tmp_path / "acme-thing"
    rules = ["--select", "E,F,W,UP,B,C4,SIM,RET,PIE,RUF,N", "--ignore", "N812"]  # functional as F
    for words in (["check", *rules], ["format", "--check"]):
        done = ran(folder, "-m", "ruff", *words, "--line-length", "110", "--isolated", ".")
        assert done.returncode == 0, done.stdout


def test_the_command_says_what_is_next(tmp_path: Path) -> None:
    line = ["plugins", "new", "acme-dino", "--slot", "understanding-encoder", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0
    assert "src/acme_dino/understanding_encoder.py" in done.stdout
    assert "pytest" in done.stdout
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["acme-dino"]  # nothing half-written


@pytest.mark.parametrize(
    ("name", "slot", "said"),
    [
        ("Acme Dino", "adaptor", "is not a valid plugin name"),
        ("../acme", "adaptor", "is not a valid plugin name"),
        ("class", "adaptor", "is not a valid plugin name"),
        ("torch", "adaptor", "a module called 'torch' is installed already"),
        ("acme-dino", "adapter", "Did you mean 'adaptor'?"),
    ],
)
def test_what_cannot_be_written_says_why(tmp_path: Path, name: str, slot: str, said: str) -> None:
    done = CliRunner().invoke(app, ["plugins", "new", name, "--slot", slot, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_slot_has_a_template_and_a_word() -> None:
    assert set(CONTRACT_TESTS) == set(SLOTS)
    assert {file.name for file in (TEMPLATE / "components").iterdir()} == {
        f"{slot}.py.jinja" for slot in SLOTS
    }
    for slot in SLOTS:
        assert slot_named(slot) == slot_named(slot_label(slot).replace(" ", "-")) == slot


def test_a_part_of_a_slots_name_is_answered_with_the_whole_name() -> None:
    with pytest.raises(PluginError, match=r"no slot 'encoder'\. Did you mean 'understanding-encoder'\?"):
        slot_named("encoder")
    stages = ["train/janus/stage1", "train/janus/stage2", "train/janus_pro/stage1"]
    assert did_you_mean("stage1", stages) == f"Did you mean '{stages[0]}' or '{stages[2]}'?"
    assert did_you_mean("age", ["stage"]) == "Did you mean 'stage'?"  # similar
    assert did_you_mean("ta", ["stage"]) == ""
