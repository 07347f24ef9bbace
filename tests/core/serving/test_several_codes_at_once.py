"""Samplers that feed several positions at a time, in an engine: the results that each request has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from janus_modular.janus import Janus
from janus_modular.serving import AnswerRequest, DrawRequest, Engine, PartialImage, Progress
from janus_modular.serving.drawing_record import DrawingRecord

CODES = 16


@pytest.fixture(scope="module")
def drafting(tiny: Janus) -> Any:
    """The model with samplers that check drafts; requests are compared with the sequential ones."""
    return Janus.of(tiny.assembly).use_samplers(text="prompt-lookup", image="parallel")


def test_joined_requests_get_what_drawing_code_by_code_gives(tiny: Janus, drafting: Janus) -> None:
    drawings = [DrawRequest("a cat", seed=1, n=2), DrawRequest("a dog", seed=2, guidance=1.0)]
    drawings.append(DrawRequest("a", seed=3, settings={"window": 7, "prefix": [3, 60, 0]}))
    answers = [
        AnswerRequest("what what what", max_new_tokens=20),
        AnswerRequest("x", max_new_tokens=12, seed=4),
    ]
    with Engine(drafting, rows=8) as engine:
        jobs = [engine.submit(request) for request in (*drawings, *answers)]
        results: list[Any] = [job.result(120) for job in jobs]
    for request, result in zip(drawings, results, strict=False):
        settings = {key: value for key, value in request.settings.items() if key != "window"}
        expected = tiny.draw(
            request.prompt, request.n, seed=request.seed, guidance=request.guidance, **settings
        )
        np.testing.assert_array_equal(np.stack(result.encoded), np.stack(expected.encoded))
    for answer, result in zip(answers, results[len(drawings) :], strict=True):
        assert result == tiny.chat(answer.prompt, max_tokens=answer.max_new_tokens, seed=answer.seed)


def test_partial_images_and_progress_follow_the_passes(tiny: Janus, drafting: Janus) -> None:
    with Engine(drafting, rows=2) as engine:
        request = DrawRequest("a cat", seed=1, partial_images=3, settings={"window": 8})
        *events, finished = engine.submit(request)
    progress = [event.done for event in events if isinstance(event, Progress)]
    assert progress == sorted(set(progress))
    assert progress[-1] == CODES > len(progress)
    partial = {event.number: event.image for event in events if isinstance(event, PartialImage)}
    assert sorted(partial) == [0, 1, 2]
    codes = finished.result.encoded[0]
    step = CODES * 2 // 5  # the second is decoded once so many codes are known
    known = next(done for done in progress if done >= step)
    filled = np.concatenate([codes[:known], np.repeat(codes[known - 1], CODES - known)])
    expected = tiny.model.generation.decode_image(torch.from_numpy(filled)[None])[0]
    assert np.array_equal(np.asarray(partial[1]), expected.permute(1, 2, 0).numpy())


def test_a_partial_image_begins_with_its_prefix(tiny: Janus) -> None:
    prefix = [3, 60, 0, 7, 12]
    with Engine(tiny, rows=2) as engine:
        request = DrawRequest("a cat", seed=1, partial_images=1, settings={"prefix": prefix})
        *events, finished = engine.submit(request)
    [partial] = [event for event in events if isinstance(event, PartialImage)]
    known = max(CODES // 3, len(prefix) + 1)
    codes = finished.result.encoded[0]
    filled = np.concatenate([codes[:known], np.repeat(codes[known - 1], CODES - known)])
    expected = tiny.model.generation.decode_image(torch.from_numpy(filled)[None])[0]
    assert np.array_equal(np.asarray(partial.image), expected.permute(1, 2, 0).numpy())


def test_a_journal_gets_the_codes_that_are_final(
    drafting: Janus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: dict[int, list[Any]] = {0: [], 1: []}
    add = DrawingRecord.add

    def added(record: DrawingRecord, image: int, code: Any) -> None:
        codes[image].append(np.asarray(code).tolist())
        add(record, image, code)

    monkeypatch.setattr(DrawingRecord, "add", added)
    with Engine(drafting, rows=4, journal=tmp_path) as engine:
        drawn: Any = engine.submit(DrawRequest("a cat", n=2, seed=1, request_id="a")).result(120)
    assert [codes[image] for image in (0, 1)] == [encoded.tolist() for encoded in drawn.encoded]
