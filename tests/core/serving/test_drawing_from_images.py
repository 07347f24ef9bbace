"""Drawings from images in an engine: those of calls alone, beside other requests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from janus_modular import PromptError
from janus_modular.janus import Janus
from janus_modular.serving import AnswerRequest, DrawRequest, Engine
from janus_modular.testing.serving import alone, ensure_same


@pytest.fixture
def engine(tiny: Janus) -> Iterator[Engine]:
    engine = Engine(tiny, rows=8)
    yield engine
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.draw_rows, stats.failed) == (0, 0, 0, 0)
    engine.close()


@pytest.mark.parametrize("image_form", ["input", "encoded", "both"])
def test_drawings_from_images_are_joined(
    tiny: Janus, engine: Engine, photos: list[Any], image_form: Any
) -> None:
    requests = [
        DrawRequest("a hat", n, seed=n, images=photos[:n], image_form=image_form, size=size)
        for n, size in ((1, None), (2, (48, 32)), (1, (32, 48)))
    ]
    answer = AnswerRequest("what?", images=photos[:1], max_new_tokens=9)
    jobs = [engine.submit(request) for request in (*requests, answer)]
    for request, job in zip((*requests, answer), jobs, strict=True):
        ensure_same(request, job.result(60), alone(tiny, request))


def test_images_of_a_drawing_are_checked_before_it_waits(engine: Engine) -> None:
    with pytest.raises(PromptError, match="image_form: found 'codes'; expected input, encoded, both"):
        engine.submit(DrawRequest("a", image_form="codes"))  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="image_form: found 'both' without images"):
        engine.submit(DrawRequest("a", image_form="both"))
    with pytest.raises(PromptError, match="the context has 512"):
        engine.submit(DrawRequest("a", images=[np.zeros((40, 40, 3), np.uint8)] * 99))


def test_an_asynchronous_call_draws_from_images(tiny: Janus, photos: list[Any]) -> None:
    janus = Janus.of(tiny.assembly)
    options: dict[str, Any] = {"images": photos[0], "image_form": "both", "size": (48, 32), "seed": 3}
    drawings = asyncio.run(janus.adraw("a hat", **options))
    assert np.array_equal(drawings.encoded, tiny.draw("a hat", **options).encoded)
    with pytest.raises(PromptError, match="image_guidance"):
        asyncio.run(janus.adraw("a hat", image_guidance=2.0, images=photos[0]))
    janus.engine.close()
