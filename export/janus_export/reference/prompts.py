"""What is asked of a model and of its bundle, so that what they say can be compared."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from PIL import Image

from janus_export.reference.recording import ListeningRuntime, Run
from janus_modular import ImageInput, Message, Processor, Text
from janus_modular.janus import Janus
from janus_modular.plugins import default_plugins
from janus_modular.protocols import Runtime


def images(count: int) -> list[Image.Image]:
    """Make images of noise, each of a size of its own."""
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30 + 7 * i, 3), dtype=np.uint8))
        for i in range(count)
    ]


def questions() -> list[list[Message]]:
    """Ask three things of different lengths: one image, none, two."""
    first, second = images(2)
    return [
        [Message("user", [ImageInput(first), Text("What is this?")])],
        [Message("user", [Text("Say something longer than the others, about nothing in particular.")])],
        [Message("user", [ImageInput(first), Text("or"), ImageInput(second)])],
    ]


DRAWN = ("a cat", "a much longer description of two dogs")
DRAWING: dict[str, Any] = {"guidance": 5.0, "temperature": 1.0, "seed": 11}
ANSWER_TOKENS = 24


def known_settings(slot: str, sampler: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return those settings that a sampler has; a sampler of a plugin may have none of the built-in ones."""
    known = {field.name for field in fields(default_plugins().entry(slot, sampler).config)}
    return {name: value for name, value in settings.items() if name in known}


def listen_to_answers(
    runtime: Runtime, processor: Processor, asked: list[list[Message]], **settings: Any
) -> tuple[list[str], Run]:
    """Let a runtime answer questions side by side; return the answers and what was heard."""
    listening = ListeningRuntime(runtime)
    answers = Janus(listening, processor).chat_batch(
        [(question, ()) for question in asked],
        max_tokens=ANSWER_TOKENS,
        **known_settings("text_samplers", runtime.text_sampler, settings),
    )
    return list(answers), listening.runs[-1]


def listen_to_drawings(runtime: Runtime, processor: Processor) -> tuple[list[Image.Image], Run]:
    """Let a runtime draw under guidance, with noise from a seed; return images and what was heard."""
    listening = ListeningRuntime(runtime)
    drawn = Janus(listening, processor).draw(
        DRAWN, **known_settings("image_samplers", runtime.image_sampler, DRAWING)
    )
    return drawn, listening.runs[-1]
