"""Prompts that a model and its bundle are run on, to compare what they answer and draw."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
from PIL import Image

from janus_export.reference.recording import RecordingRuntime, Run
from janus_modular import ImageInput, Message, Processor, Text
from janus_modular.janus import Janus
from janus_modular.plugins import default_plugins
from janus_modular.protocols import Runtime


def images(count: int) -> list[Image.Image]:
    """Return images of noise, of different sizes."""
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30 + 7 * i, 3), dtype=np.uint8))
        for i in range(count)
    ]


def elongated_images() -> list[Image.Image]:
    """Return images of noise that have one column, or one row, of patches in native size."""
    noise = np.random.default_rng(9).integers(0, 255, (4, 2000, 3), dtype=np.uint8)
    return [Image.fromarray(noise), Image.fromarray(np.ascontiguousarray(noise.transpose(1, 0, 2)))]


def questions() -> list[list[Message]]:
    """Return three prompts of different lengths: with one image, none, two."""
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


def record_answers(
    runtime: Runtime, processor: Processor, prompts: list[list[Message]], **settings: Any
) -> tuple[list[str], Run]:
    """Answer questions in one batch; return the answers and the recording."""
    recording = RecordingRuntime(runtime)
    answers = Janus(recording, processor).chat_batch(
        [(prompt, ()) for prompt in prompts],
        max_tokens=ANSWER_TOKENS,
        **known_settings("text_samplers", runtime.text_sampler, settings),
    )
    return list(answers), recording.runs[-1]


def record_drawings(
    runtime: Runtime, processor: Processor, *, count: int = 1, **settings: Any
) -> tuple[list[Image.Image], Run]:
    """Draw ``count`` images of each prompt, under guidance by default; return images and recording."""
    recording = RecordingRuntime(runtime)
    drawn = Janus(recording, processor).draw(
        DRAWN, count, **known_settings("image_samplers", runtime.image_sampler, DRAWING | settings)
    )
    return drawn, recording.runs[-1]
