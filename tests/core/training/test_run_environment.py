"""Checkpoints record config, commit, versions and plugins of their run."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from janus_modular import PluginError
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load
from janus_modular.plugins import Plugins, default_plugins, set_default_plugins
from janus_modular.plugins.lock import LOCK, plugin_digests, write_lock
from janus_modular.training.run_environment import git_state
from janus_modular.training.schema import TrainConfig
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


MINE = """
from janus_plugins.adaptors.mlp import MlpAdaptor, MlpConfig
from janus_modular import hookimpl

@hookimpl
def register_adaptors(registry):
    registry.add("mine", MlpAdaptor, MlpConfig)
"""

OWN_SOURCE = """
from janus_plugins.sources.jsonl import Jsonl, JsonlConfig
from janus_modular import hookimpl

@hookimpl
def register_sources(registry):
    registry.add("mine", Jsonl, JsonlConfig)
"""


@pytest.fixture
def mine(make: Make, data: Path, tmp_path: Path) -> Callable[[str, int], tuple[Plugins, TrainConfig]]:
    """Write an adaptor and a source of local files; return all plugins, and the config of a run with both."""

    def write(comment: str, stop: int) -> tuple[Plugins, TrainConfig]:
        plugins = Plugins(default_plugins().entry_points)
        for name, text in (("adaptor.py", MINE), ("source.py", OWN_SOURCE)):
            (tmp_path / name).write_text(text + comment)
            plugins.add_file(tmp_path / name)
        set_default_plugins(plugins)
        model = load("tiny", ["understanding.adaptor=mine"], plugins)
        sources = {"read": {"name": "mine", "path": str(data / "read.jsonl"), "questions": ["Colour?"]}}
        return plugins, make(
            model=model, sources=sources, mixture={"read": 1}, checkpoint_every=1, schedule__stop=stop
        )

    return write


Mine = Callable[[str, int], tuple[Plugins, TrainConfig]]


def test_resuming_lists_plugins_whose_code_has_changed(
    mine: Mine, capsys: pytest.CaptureFixture[str]
) -> None:
    plugins, config = mine("", 1)
    train(config, quiet=True, plugins=plugins)
    plugins, config = mine("", 2)
    train(config, quiet=True, plugins=plugins, resume=True)
    assert "\n  plugin " not in capsys.readouterr().err
    plugins, config = mine("# changed\n", 3)
    train(config, quiet=True, plugins=plugins, resume=True)
    printed = capsys.readouterr().err
    for file in ("adaptor.py", "source.py"):
        assert re.search(rf"^  plugin {file}: 'no version \(sha256 \w+\)' then, 'no version", printed, re.M)
    assert "plugin janus-modular" not in printed


@pytest.mark.parametrize("locked", ["model", "checkpoints/step-0000001"])
def test_a_locked_run_is_not_resumed_with_other_plugins(mine: Mine, locked: str) -> None:
    plugins, config = mine("", 1)
    model = train(config, quiet=True, plugins=plugins)
    lock = write_lock(model.parent / locked, plugins)
    plugins, config = mine("", 2)
    train(config, quiet=True, plugins=plugins, resume=True)
    assert (model / LOCK).exists() == (locked == "model")
    write_lock(model.parent / locked.replace("1", "2"), plugins)
    plugins, config = mine("# changed\n", 3)
    with pytest.raises(PluginError, match=r"adaptor\.py: other bytes in adaptor\.py"):
        train(config, quiet=True, plugins=plugins, resume=True)
    lock.unlink()
    (model.parent / locked.replace("1", "2") / LOCK).unlink(missing_ok=True)
    train(config, quiet=True, plugins=plugins, resume=True)


def test_a_model_that_is_written_again_keeps_no_lock_of_other_plugins(
    mine: Mine, caplog: pytest.LogCaptureFixture
) -> None:
    plugins, config = mine("", 1)
    model = train(config, quiet=True, plugins=plugins)
    write_lock(model, plugins)
    assembly = ModelAssembly.from_checkpoint(model, plugins=plugins)
    save(assembly, model, plugins=plugins)
    assert (model / LOCK).exists()
    plugins, _ = mine("# changed\n", 1)
    save(assembly, model, plugins=plugins)
    assert not (model / LOCK).exists()
    assert f"Lock again: janus-modular plugins lock {model}" in caplog.text


def test_a_run_needs_no_plugin_of_a_sampler(mine: Mine) -> None:
    plugins, config = mine("", 1)
    model = train(config, quiet=True, plugins=plugins)
    record = json.loads((model / "config.json").read_text())
    sampler = next(item for item in record["plugins"] if item["slot"] == "text_samplers")
    sampler.update(dist="acme", name="acme")
    record["model"]["text_sampler"] = "acme"
    (model / "config.json").write_text(json.dumps(record))
    config = replace(config, init=str(model), model=None, output=f"{config.output}-2")
    assert (train(config, quiet=True, plugins=plugins) / "config.json").exists()


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
