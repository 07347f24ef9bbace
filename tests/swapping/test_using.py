"""A model of selected components works in Python, on the command line, and after saving."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from janus_modular import PluginError, Plugins
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.janus import Janus


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8))


def cli(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


def test_what_was_put_together_answers_draws_and_comes_back_from_disk(
    one_of_six: Any, table: ModuleType, plugins: Plugins, tmp_path: Path
):
    """From Python, then the same from the command line on the saved checkpoint."""
    janus = Janus.of(ModelAssembly(*one_of_six.build(plugins)), plugins)
    answer = janus.chat("What is this?", [image()], max_tokens=5)
    drawn = janus.draw("a square", guidance=2.0, seed=3)
    assert [one.size for one in drawn] == [table.DRAWN[::-1]]

    janus.save_pretrained(tmp_path / "model")
    image().save(tmp_path / "asked.png")
    plugin = ("--plugin", str(table.EXAMPLE))
    model = str(tmp_path / "model")
    asked = ("--image", str(tmp_path / "asked.png"), "--max-tokens", "5", "--json")
    said = cli(*plugin, "chat", model, "What is this?", *asked)
    assert json.loads(said)["answer"] == answer
    out = tmp_path / "drawn.png"
    cli(*plugin, "draw", model, "a square", "--guidance", "2", "--seed", "3", "-n", "1", "-o", str(out))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(drawn[0]))


def test_a_checkpoint_names_the_plugin_file_that_it_needs(
    table: ModuleType, plugins: Plugins, tmp_path: Path
):
    """Also where only this model was given the plugin, in a notebook say."""
    own = Plugins(plugins.entry_points)
    janus = Janus.of(ModelAssembly(*table.Row("efficientnet-lite0").build(own)), own)
    janus.save_pretrained(tmp_path / "model")
    assert Janus.from_pretrained(tmp_path / "model", plugins=own).model
    with pytest.raises(PluginError, match=r"--plugin efficientnet_lite0.py"):
        Janus.from_pretrained(tmp_path / "model")
