"""Settings of third-party samplers: values of a wrong type, and values that their dataclass refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from janus_modular import Plugins, samplers
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import PromptError
from janus_modular.janus import Janus
from janus_modular.plugins import default_plugins

SAMPLERS = """
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
import numpy as np
from numpy.typing import NDArray
from janus_modular import ImageSamplerSettings, TextSamplerSettings, hookimpl

@dataclass
class PenaltySettings(TextSamplerSettings):
    penalty: float = 2.0
    limit: float | None = None
    words: Sequence[str] = ()
    pattern: str = "."
    weights: NDArray = None
    label: str = ""
    low: int = 0
    high: int = 9
    def __post_init__(self):
        if not self.penalty >= 1:
            raise ValueError("expected a penalty from 1")
        if self.low > self.high:
            raise ValueError("low is above high")
        self.pattern = re.compile(self.pattern)

@dataclass
class ShadeSettings(ImageSamplerSettings):
    shade: int = 3
    def __post_init__(self):
        if self.shade < 0:
            raise ValueError("expected a shade from 0")

def answer(session, prompts, settings):
    yield np.zeros(len(prompts), np.int64)

def draw(session, prompts, settings):
    yield 1, 1
    return np.full((len(prompts), 3, 4, 4), settings.shade, np.uint8)

@hookimpl
def register_text_samplers(registry):
    registry.add("acme-words", answer, PenaltySettings)

@hookimpl
def register_image_samplers(registry):
    registry.add("acme-shades", draw, ShadeSettings)
"""


@pytest.fixture
def third_party(plugins: Plugins, tmp_path: Path) -> Plugins:
    (tmp_path / "acme_settings.py").write_text(SAMPLERS)
    plugins.add_file(tmp_path / "acme_settings.py")
    return plugins


@pytest.fixture
def janus(third_party: Plugins) -> Janus:
    torch.manual_seed(0)
    janus = Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)), third_party)
    return janus.use_samplers(text="acme-words", image="acme-shades")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"penalty": 0.5}, r"'acme-words' refuses penalty=0.5: expected a penalty from 1$"),
    ({"low": 3, "penalty": 0.5}, r"'acme-words' refuses penalty=0.5: expected a penalty from 1$"),
    ({"low": 3, "high": 2}, r"'acme-words' refuses low=3, high=2: low is above high$"),
    ({"penalty": "x"}, r"'acme-words': penalty: found 'x'; expected a number\.$"),
    ({"penalty": None}, r"'acme-words': penalty: found None; expected a number\.$"),
    ({"penalty": True}, r"'acme-words': penalty: found True; expected a number\.$"),
    (
        {"penalty": float("nan")},
        r"'acme-words': penalty: found nan; expected a number: nan is not a finite number\.$",
    ),
    ({"limit": "x"}, r"'acme-words': limit: found 'x'; expected a number or null\.$"),
    ({"words": "abc"}, r"'acme-words': words: found 'abc'; expected a list, each text\.$"),
    ({"max_tokens": 2.5}, r"'acme-words': max_tokens: found 2.5; expected a whole number\.$"),
    ({"numbers": ["a"]}, r"'acme-words': numbers: found \['a'\]; expected a list, each a whole number\.$"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_wrong_value_is_an_error_that_names_sampler_and_setting(
    janus: Janus, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=rf"^the text sampler {message}"):
        janus.text_settings(settings)
    with pytest.raises(PromptError, match=message):
        janus.chat("a", **settings)


def test_a_wrong_value_of_a_drawing(janus: Janus) -> None:
    with pytest.raises(
        PromptError, match=r"^the image sampler 'acme-shades' refuses shade=-1: expected a shade"
    ):
        janus.draw("a", shade=-1)
    with pytest.raises(PromptError, match=r"^the image sampler 'acme-shades': shade: found 'x'; expected"):
        janus.draw("a", shade="x")


def test_values_become_what_the_dataclass_declares(janus: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_SECRET", "secret")
    weights = np.ones(2)
    settings: Any = janus.text_settings(
        {
            "penalty": np.int64(3),
            "limit": 2,
            "words": ["a", "${oc.env:ACME_SECRET}", "???"],
            "numbers": range(2),
            "pattern": "a+",
            "weights": weights,
            "label": "${oc.env:ACME_SECRET}",
            "low": -(2**70),
        }
    )
    assert (settings.penalty, type(settings.penalty), type(settings.limit)) == (3.0, float, float)
    assert settings.words == ["a", "${oc.env:ACME_SECRET}", "???"]
    assert (settings.label, settings.low) == ("${oc.env:ACME_SECRET}", -(2**70))
    assert [*settings.numbers] == [0, 1]
    assert settings.pattern.pattern == "a+"
    assert settings.weights is weights


def test_a_number_as_text_is_no_environment_variable(janus: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_NUMBER", "5")
    with pytest.raises(PromptError, match="penalty: found"):
        janus.text_settings({"penalty": "${oc.env:ACME_NUMBER}"})


def test_built_in_samplers_check_and_convert_themselves() -> None:
    plugins = default_plugins()
    _, settings = samplers.with_settings(
        plugins, "text_samplers", "text", {"temperature": np.float32(0.5), "seed": 2**80, "numbers": range(2)}
    )
    assert (settings.temperature, settings.seed, settings.numbers) == (0.5, 2**80, (0, 1))
    with pytest.raises(PromptError, match=r"^temperature: found '0\.5'; expected"):
        samplers.with_settings(plugins, "text_samplers", "text", {"temperature": "0.5"})
    _, drawing = samplers.with_settings(
        plugins, "image_samplers", "autoregressive", {"prefix": np.ones((2, 3), np.int64)}
    )
    assert drawing.prefix == ((1, 1, 1), (1, 1, 1))


@pytest.fixture
def checkpoint(third_party: Plugins, tmp_path: Path) -> Path:
    Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("command", "sampler", "setting", "message"),
    [
        ("chat", "acme-words", "penalty=0.5", "'acme-words' refuses penalty=0.5: expected a penalty from 1"),
        ("chat", "acme-words", "penalty=x", "'acme-words': penalty: found 'x'; expected a number."),
        ("draw", "acme-shades", "shade=-1", "'acme-shades' refuses shade=-1: expected a shade from 0"),
        ("draw", "acme-shades", "shade=null", "'acme-shades': shade: found None; expected a whole number."),
    ],
)
def test_a_command_ends_with_the_error(
    checkpoint: Path, command: str, sampler: str, setting: str, message: str
) -> None:
    done = CliRunner().invoke(app, [command, str(checkpoint), "a", "--sampler", sampler, "--set", setting])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
