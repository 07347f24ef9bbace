"""``--set``: settings of samplers on the command line, each given once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.cli.options import collect_settings
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus


def test_settings_are_values_in_yaml() -> None:
    assignments = ["top_k=5", "words=[a, b]", "text=a=b", "guidance=2e0"]
    assert collect_settings({"seed": 3, "top_k": None}, assignments) == {
        "seed": 3,
        "top_k": 5,
        "words": ["a", "b"],
        "text": "a=b",
        "guidance": 2.0,
    }


@pytest.mark.parametrize(
    ("named", "assignments", "expected"),
    [
        ({"max_tokens": 2}, ["max_tokens=30"], "max_tokens is given already: 2"),
        ({}, ["top_k=1", "top_k=2"], "top_k is given already: 1"),
        ({}, ["top_k=["], r"--set top_k=\[: its value is not YAML: .*expected"),
        ({}, ["day=2026-13-01"], "its value is not YAML: month"),
        ({}, ["top_k"], "expected NAME=VALUE"),
        ({}, ["=3"], "expected NAME=VALUE"),
    ],
)
def test_ambiguous_settings_are_errors(named: dict[str, int], assignments: list[str], expected: str) -> None:
    with pytest.raises(typer.BadParameter, match=expected):
        collect_settings(named, assignments)


@pytest.mark.parametrize(
    "words", [["chat", "nowhere", "what?", "--max-tokens", "2"], ["draw", "nowhere", "cat"]]
)
def test_settings_are_checked_before_the_model_is_loaded(words: list[str]) -> None:
    done = CliRunner().invoke(app, [*words, "--set", "max_tokens=3", "--set", "max_tokens=4"])
    assert done.exit_code == 2
    assert "max_tokens is given already" in " ".join(done.output.replace("│", " ").split())


def test_drawing_continues_from_an_image_number() -> None:
    torch.manual_seed(0)
    janus = Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))
    four = [np.asarray(one) for one in janus.draw("a", 4)]
    last = [np.asarray(one) for one in janus.draw("a", 2, batch_size=1, **collect_settings({}, ["first=2"]))]
    np.testing.assert_array_equal(last, four[2:])
    assert (four[0] != four[2]).any()
