"""Sampling loops of strangers in the facade: one that keeps the protocol is used, others are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from janus_modular import PromptError
from janus_modular.checkpoints.from_config import compose
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import CheckError
from janus_modular.janus import Janus
from janus_modular.plugins import Plugins
from janus_modular.testing import SamplingExample, checks_of, run_check
from janus_modular.testing.examples import NumpySession, prompt

LOOPS = """
from dataclasses import dataclass
import numpy as np
from janus_modular import hookimpl

@dataclass
class Plain:
    shade: int = 7  # of every pixel

@dataclass
class Numbered:
    first: int = 0  # the number of the first image

@dataclass
class Answers:
    max_tokens: int = 3

def pixels(shades):
    return np.stack([np.full((3, 4, 4), shade, np.uint8) for shade in shades])

def plain(session, prompts, settings):
    yield 1, 1
    return pixels([settings.shade] * len(prompts))

def numbered(session, prompts, settings):
    yield 1, 1
    return pixels(range(settings.first, settings.first + len(prompts)))

def silent(session, prompts, settings):
    yield None
    return pixels([settings.shade] * len(prompts))

def unfinished(session, prompts, settings):
    yield 1, 1

def columns(session, prompts, settings):
    yield np.zeros((len(prompts), 1), np.int64)

@hookimpl
def register_sampling_loops(registry):
    registry.add("plain", plain, Plain)
    registry.add("numbered", numbered, Numbered)
    registry.add("silent", silent, Plain)
    registry.add("unfinished", unfinished, Plain)
    registry.add("columns", columns, Answers)
    registry.add("mute", silent, Answers)
"""


@pytest.fixture(scope="module")
def model() -> Janus:
    torch.manual_seed(0)
    return Janus.of(*compose(resolve(load("model/tiny"), ModelConfig)))


@pytest.fixture
def strange(plugins: Plugins, tmp_path: Path) -> Plugins:
    (tmp_path / "strange.py").write_text(LOOPS)
    plugins.add_file(tmp_path / "strange.py")
    return plugins


@pytest.fixture
def janus(model: Janus, strange: Plugins) -> Janus:
    return Janus.of(model.model, model.processor, strange)  # in a runtime of its own


def drawn(janus: Janus, loop: str, **options: object) -> list[int]:
    janus.runtime.image_sampler = loop
    return [int(np.asarray(one)[0, 0, 0]) for one in janus.draw("a", **options)]


def test_a_loop_that_numbers_no_images_draws_one_batch(janus: Janus) -> None:
    assert drawn(janus, "plain", n=3, shade=9) == [9, 9, 9]
    with pytest.raises(PromptError, match=r"'plain' draws one batch alone.*'first'.*batch_size=3"):
        drawn(janus, "plain", n=3, batch_size=2)


def test_a_loop_that_numbers_images_is_told_the_first_of_each_batch(janus: Janus) -> None:
    assert drawn(janus, "numbered", n=3, batch_size=2) == [0, 1, 2]
    assert drawn(janus, "numbered", n=3, batch_size=2, first=5) == [5, 6, 7]


@pytest.mark.parametrize(
    ("loop", "found"),
    [
        ("silent", r"it yielded None; expected \(steps done, steps in all\)"),
        ("unfinished", r"it returned None; expected pixels \(1, 3, H, W\)"),
        ("text", r"it yielded an array \(1,\) of int64"),
    ],
)
def test_a_loop_that_does_not_draw_is_named(janus: Janus, loop: str, found: str) -> None:
    with pytest.raises(CheckError, match=f"'{loop}' is none that draws: {found}"):
        drawn(janus, loop)


@pytest.mark.parametrize(
    ("loop", "found"),
    [
        ("autoregressive", "its settings have no max_tokens"),
        ("columns", r"it yielded an array \(2, 1\) of int64; expected token ids"),
        ("mute", "it yielded None"),
    ],
)
def test_a_loop_that_does_not_answer_is_named(janus: Janus, loop: str, found: str) -> None:
    janus.runtime.text_sampler = loop
    with pytest.raises(CheckError, match=f"'{loop}' is none that answers: {found}"):
        janus.chat_batch([("a", ()), ("b", ())])


@pytest.mark.parametrize(
    ("loop", "outcome"),
    [
        ("text", "passed"),
        ("autoregressive", "passed"),
        ("plain", "passed"),
        ("silent", "failed"),
        ("unfinished", "failed"),
        ("columns", "failed"),
    ],
)
def test_the_checks_hold_a_loop_to_one_of_the_protocols(strange: Plugins, loop: str, outcome: str) -> None:
    entry = strange.entry("sampling_loops", loop)
    settings = entry.config(max_tokens=3) if loop == "text" else entry.config()
    example = SamplingExample(settings, [prompt(1, 2), prompt(3)], NumpySession)
    [check] = [one for one in checks_of("sampling_loops") if one.name == "loop_protocol"]
    assert run_check(check, lambda: (entry.factory, example)).outcome == outcome
