"""Settings of a third party's sampler in requests: wrong values and wrong places are the client's errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from janus_modular import Plugins
from janus_modular.janus import Janus
from janus_modular.server.settings import ServerConfig

SAMPLERS = """
from dataclasses import dataclass
import numpy as np
from janus_modular import ImageSamplerSettings, TextSamplerSettings, hookimpl

@dataclass
class PenaltySettings(TextSamplerSettings):
    seed: int = 0
    penalty: float = 2.0
    presence_penalty: float = 0.0
    def __post_init__(self):
        if not self.penalty >= 1:
            raise ValueError("expected a penalty from 1")

@dataclass
class ShadeSettings(ImageSamplerSettings):
    seed: int = 0
    shade: int = 3

def answer(session, prompts, settings):
    yield np.zeros(len(prompts), np.int64)

def draw(session, prompts, settings):
    yield 1, 1
    return np.full((len(prompts), 3, 32, 32), settings.shade, np.uint8)

@hookimpl
def register_text_samplers(registry):
    registry.add("acme-words", answer, PenaltySettings)

@hookimpl
def register_image_samplers(registry):
    registry.add("acme-shades", draw, ShadeSettings)
"""


@pytest.fixture
def client(plugins: Plugins, serving: Any, tiny_janus: Janus, tmp_path: Path) -> Iterator[openai.OpenAI]:
    (tmp_path / "acme_settings.py").write_text(SAMPLERS)
    plugins.add_file(tmp_path / "acme_settings.py")
    config = ServerConfig(warm_up=False, text_sampler="acme-words", image_sampler="acme-shades")
    with serving(Janus.of(tiny_janus.assembly, plugins), config) as served, served.client() as client:
        yield client


def ask(client: openai.OpenAI, body: dict[str, Any]) -> Any:
    messages: Any = [{"role": "user", "content": "a"}]
    return client.chat.completions.create(model="tiny", messages=messages, max_tokens=2, extra_body=body)


def draw(client: openai.OpenAI, body: dict[str, Any]) -> Any:
    return client.images.generate(model="tiny", prompt="a", extra_body=body)


@pytest.mark.parametrize(
    ("request_", "settings", "message"),
    [
        (ask, {"penalty": 0.5}, "'acme-words' refuses penalty=0.5: expected a penalty from 1"),
        (ask, {"penalty": None}, "'acme-words': penalty: found None; expected a number."),
        (ask, {"penalty": "x"}, "'acme-words': penalty: found 'x'; expected a number."),
        (draw, {"shade": "x"}, "'acme-shades': shade: found 'x'; expected a whole number."),
        (draw, {"shade": [1]}, "'acme-shades': shade: found [1]; expected a whole number."),
    ],
)
def test_a_wrong_value_is_the_clients_error(
    client: openai.OpenAI, request_: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        request_(client, {"settings": settings})
    assert message in caught.value.message


def respond(client: openai.OpenAI, body: dict[str, Any]) -> Any:
    return client.responses.create(model="tiny", input="a", extra_body=body)


WORDS, SHADES = "of the text sampler 'acme-words'", "of the image sampler 'acme-shades'"


@pytest.mark.parametrize(
    ("request_", "body", "param", "message"),
    [
        (ask, {"penalty": 3}, "penalty", f"penalty: no field, but a setting {WORDS}. Put it into the field"),
        (ask, {"presence_penalty": 0.5}, "presence_penalty", f"a setting {WORDS}. Put it into"),
        (draw, {"shade": 3}, "shade", f'{SHADES}. Put it into the field `settings`: {{"settings": {{"shade"'),
        (respond, {"penalty": 3}, "penalty", f"a setting {WORDS}. Put it into the field `settings`"),
        (
            respond,
            {"tools": [{"type": "image_generation", "shade": 3}]},
            "tools.0.shade",
            f"{SHADES}. Put it into the field `tools.0.settings`",
        ),
        (ask, {"shade": 3}, "shade", "shade: unknown, so that it would have no effect."),
        (ask, {"stream": True, "stream_options": {"penalty": 3}}, "stream_options.penalty", "no effect"),
        (ask, {"frequency_penalty": 0.5}, "frequency_penalty", "no penalties. Leave it out"),
        (draw, {"numbers": [1]}, "numbers", "numbers: unknown, so that it would have no effect."),
    ],
)
def test_a_setting_in_the_place_of_a_field_names_its_place(
    client: openai.OpenAI, request_: Any, body: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        request_(client, body)
    assert caught.value.param == param
    assert message in caught.value.message
