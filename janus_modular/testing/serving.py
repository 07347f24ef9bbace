"""Requests of every sort for an engine, and the comparison of their results with those of calls alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from janus_modular.answers import Answer, Drawings
from janus_modular.janus import Janus
from janus_modular.serving import AnswerRequest, DrawRequest
from janus_modular.testing.check import ensure

SYSTEM = "You are a helpful assistant who answers in one short sentence. "
"""The beginning of many prompts, which is read once where rows can be copied."""


def mixed_requests(count: int, images: Sequence[Image.Image] = ()) -> list[AnswerRequest | DrawRequest]:
    """Return answers and drawings with and without images, guidance, sampling and shared beginnings."""
    requests: list[AnswerRequest | DrawRequest] = []
    for i in range(count):
        sampled = {"temperature": 1.0 + i % 2, "top_k": 20 * (i % 3), "top_p": 1.0 - 0.1 * (i % 2)}
        answer = partial(AnswerRequest, seed=i, settings=sampled)
        match i % 6:
            case 0:
                requests.append(DrawRequest(f"a drawing of {i % 4} cats", n=1 + i % 3, seed=i))
            case 1:
                requests.append(answer(SYSTEM + f"Question {i}?", max_new_tokens=7 + i % 5))
            case 2:
                shown_images = list(images[: i // 6 % 2])
                dog = DrawRequest("a dog", seed=i, guidance=1.0, temperature=0.5 + i % 3, images=shown_images)
                requests.append(dog)
            case 3:
                shown_images = list(images[: 1 + i % 2])
                requests.append(answer(f"What is this? {i}", images=shown_images, max_new_tokens=5))
            case 4:
                requests.append(answer(SYSTEM * (1 + i % 3), stop=["a", "e"], max_new_tokens=30))
            case _:
                requests.append(DrawRequest("a bird", seed=i, settings={"prefix": [i % 7, 3, 5]}))
    return requests


def alone(janus: Janus, request: AnswerRequest | DrawRequest) -> Answer | Drawings:
    """Return what a request gives without an engine."""
    if isinstance(request, DrawRequest):
        return janus.draw(
            request.prompt,
            request.n,
            images=request.images,
            image_form=request.image_form,
            size=request.size,
            batch_size=1,
            seed=request.seed,
            guidance=request.guidance,
            temperature=request.temperature,
            **request.settings,
        )
    return janus.chat(
        request.prompt,
        request.images,
        stop=request.stop,
        seed=request.seed,
        max_tokens=request.max_new_tokens,
        **request.settings,
    )


def ensure_same(
    request: AnswerRequest | DrawRequest, result: Answer | Drawings, expected: Answer | Drawings
) -> None:
    """Compare a result with that of the request alone: text, usage and reason, or codes, pixels and usage.

    Raises:
        CheckError: they differ.
    """
    for (name, actual), value in zip(comparable(result), dict(comparable(expected)).values(), strict=True):
        ensure(actual == value, f"{name} of {request}: found {actual!r:.200}; alone it is {value!r:.200}")


def comparable(result: Answer | Drawings) -> list[tuple[str, Any]]:
    """Return everything in a result that must not depend on other requests, by name."""
    if isinstance(result, Answer):
        return [("text", str(result)), ("finish_reason", result.finish_reason), ("usage", result.usage)]
    codes = [np.asarray(encoded).tolist() for encoded in result.encoded or ()]
    return [("codes", codes), ("images", [image.tobytes() for image in result]), ("usage", result.usage)]
