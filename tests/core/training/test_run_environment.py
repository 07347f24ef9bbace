"""Checkpoints record config, commit, versions and plugins of their run."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from janus_modular.plugins import default_plugins
from janus_modular.plugins.lock import plugin_digests
from janus_modular.training.run_environment import git_state
from janus_modular.training.train import train

from .conftest import Make


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_and_the_changes_are_those_of_git(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "--quiet", "--initial-branch", "topic")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a.txt").write_text("a")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "--quiet", "--message", "a")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "branch": "topic", "changed": [], "num_changed": 0}
    (tmp_path / "a.txt").write_text("b")
    (tmp_path / "b.txt").write_text("b")
    state = git_state(tmp_path)
    assert state is not None
    assert state["changed"] == ["a.txt", "b.txt"]
    git(tmp_path, "checkout", "--quiet", "--detach")
    assert git_state(tmp_path)["branch"] is None  # type: ignore[index]


def test_each_checkpoint_records_them_and_the_card_shows_them(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    git(tmp_path / "code", "init", "--quiet")
    git(tmp_path / "code", "commit", "--quiet", "--allow-empty", "--message", "a")
    commit = git(tmp_path / "code", "rev-parse", "HEAD")
    model = train(make(checkpoint_every=1, schedule__steps=2), quiet=True)
    for folder in (model, *(model.parent / "checkpoints").iterdir()):
        record = json.loads((folder / "config.json").read_text("utf-8"))
        environment = record["training"]["environment"]
        assert environment["git"]["commit"] == commit
        assert environment["versions"]["torch"] == torch.__version__.partition("+")[0] or (
            environment["versions"]["torch"] == torch.__version__
        )
        [plugin] = environment["plugins"]
        assert plugin["plugin"] == "janus-modular"
        card = (folder / "README.md").read_text("utf-8")
        for words in (commit, plugin["sha256"], f"- torch {environment['versions']['torch']}"):
            assert words in card
        config = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])
        assert config == record["training"]["config"]


def test_a_digest_changes_with_the_file_of_a_plugin(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    example = Path(__file__).parents[3] / "plugins" / "examples" / "efficientnet_lite0.py"
    digests: list[Any] = []
    for text in (example.read_text("utf-8"), example.read_text("utf-8") + "# changed\n"):
        file.write_text(text, "utf-8")
        plugins = default_plugins()
        extended = type(plugins)(plugins.entry_points)
        [info] = extended.add_file(file)
        component = {"slot": info.slot, "name": info.name, "dist": None}
        [entry] = plugin_digests(extended, [component])
        names = {file.name: hashlib.sha256(text.encode()).hexdigest()}
        assert entry["sha256"] == hashlib.sha256(json.dumps(names).encode()).hexdigest()
        digests.append(entry["sha256"])
    assert digests[0] != digests[1]
