"""The serving engine with a bundle in ONNX Runtime, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from janus_modular import PromptError
from janus_modular.janus import Janus
from janus_modular.serving import AnswerRequest, DrawRequest, Engine, Progress
from janus_modular.testing.serving import alone, ensure_same, mixed_requests


@pytest.fixture(scope="module")
def bundled(tiny_bundle: Path) -> Janus:
    return Janus.from_pretrained(tiny_bundle, allow_failed=True, runtime={"name": "onnx", "threads": 1})


@pytest.mark.parametrize(
    "options",
    [{"rows": 12}, {"rows": 5, "scheduler": {"name": "fair", "chunk": 5, "alone": 7}}],
    ids=["default", "chunks of 5"],
)
def test_each_of_many_requests_gets_the_result_that_it_has_alone(
    bundled: Janus, options: dict[str, Any]
) -> None:
    images = [Image.effect_noise((40, 30), 80).convert("RGB") for _ in range(2)]
    requests = mixed_requests(24, images)
    with Engine(bundled, **options) as engine:
        jobs = [engine.submit(request) for request in requests]
        for request, job in zip(requests, jobs, strict=True):
            ensure_same(request, job.result(60), alone(bundled, request))
        assert engine.stats().reused_positions > 0
    assert not engine.session.lengths.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["several_codes_bundle", "flow_bundle"])
def test_other_paths_are_served_as_they_are(
    name: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Several codes a position; and three rows an image, without codes, of a third party."""
    janus = Janus.from_pretrained(
        request.getfixturevalue(name), allow_failed=True, runtime={"name": "onnx", "threads": 1}
    )
    drawings = [DrawRequest(f"{i}", n=1 + i % 2) for i in range(6)]
    with Engine(janus, rows=9) as engine:
        jobs = [engine.submit(drawing) for drawing in drawings]
        answer = engine.submit(AnswerRequest("beside", max_new_tokens=9))
        for drawing, job in zip(drawings, jobs, strict=True):
            ensure_same(drawing, job.result(60), alone(janus, drawing))
        ensure_same(answer.request, answer.result(60), alone(janus, answer.request))
    assert "once for each request" not in caplog.text  # their graphs were joined


def test_an_image_without_codes_has_no_partial_images(flow_bundle: Path) -> None:
    janus = Janus.from_pretrained(flow_bundle, allow_failed=True, runtime={"name": "onnx", "threads": 1})
    with (
        Engine(janus, rows=3) as engine,
        pytest.raises(PromptError, match=r"found 1; expected 0 to 0.*does not draw code by code"),
    ):
        engine.submit(DrawRequest("a", partial_images=1))


@pytest.mark.parametrize(
    "name",
    [
        "tiny_bundle",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("several_codes_bundle", "flow_bundle")),
    ],
)
def test_a_drawing_goes_on_where_another_engine_ended(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From its codes; a path without codes draws again from the seed, and the log says so."""
    janus = Janus.from_pretrained(
        request.getfixturevalue(name), allow_failed=True, runtime={"name": "onnx", "threads": 1}
    )
    drawing = DrawRequest("a cat", n=5, seed=3, request_id="mine")
    first = Engine(janus, rows=3, journal=tmp_path)
    job = first.submit(drawing)
    next(event for event in job if isinstance(event, Progress) and event.done > 5)
    first.close(drain=False)
    [file] = tmp_path.glob("*.jsonl")
    recorded = len(file.read_bytes().splitlines()) - 1
    has_codes = name != "flow_bundle"
    assert (recorded > 0) == has_codes
    with Engine(janus, rows=3, journal=tmp_path) as second:
        assert second.stats().continued_codes == recorded
        ensure_same(drawing, second.resumed[0].result(60), alone(janus, drawing))
    assert ("drawn again from its seed" in caplog.text) == (not has_codes)
