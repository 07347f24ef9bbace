"""An engine over a model in torch: results are those of calls alone, whatever else runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from janus_modular import PromptError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import (
    ConfigError,
    DeadlineError,
    QueueFullError,
    RequestCancelledError,
    ServingError,
)
from janus_modular.janus import Janus
from janus_modular.serving import (
    AnswerRequest,
    DrawRequest,
    Engine,
    Finished,
    PartialImage,
    Progress,
    TextDelta,
)
from janus_modular.testing.serving import SYSTEM, alone, ensure_same, mixed_requests


def shut(engine: Engine) -> None:
    """Check that nobody has a row, and that closing empties them all."""
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.answer_rows, stats.draw_rows) == (0, 0, 0, 0)
    engine.close()
    assert not engine.session.lengths.any()


@pytest.fixture
def engine(tiny: Janus) -> Iterator[Engine]:
    engine = Engine(tiny, rows=8)
    yield engine
    engine.close(drain=False)


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 8},
        {"rows": 24, "scheduler": {"name": "fair", "chunk": 5, "alone": 7}},
        {"rows": 4, "prefix_cache": False, "scheduler": {"name": "fair", "reserved": 0}},
        {"rows": 2},
    ],
    ids=["default", "chunks of 5", "no prefixes", "two rows"],
)
def test_each_of_many_requests_gets_the_result_that_it_has_alone(
    tiny: Janus, expected: list[tuple[Any, Any]], options: dict[str, Any]
) -> None:
    engine = Engine(tiny, **options)
    jobs = [engine.submit(request) for request, _ in expected]
    for (request, result), job in zip(expected, jobs, strict=True):
        ensure_same(request, job.result(60), result)
    stats = engine.stats()
    assert (stats.answered, stats.drawn, stats.failed) == (12, 12, 0)
    assert (stats.reused_positions > 0) is options.get("prefix_cache", True)
    shut(engine)


def test_calls_of_threads_are_joined(expected: list[tuple[Any, Any]], engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda pair: engine.submit(pair[0]).result(60), expected))
    for (request, result_alone), result in zip(expected, results, strict=True):
        ensure_same(request, result, result_alone)
    shut(engine)


def test_a_request_that_is_alone_is_joined_by_a_second(tiny: Janus, engine: Engine) -> None:
    """The first runs without waiting for others; its rows and tensors go on as a part of the batch."""
    first = engine.submit(AnswerRequest("alone", max_new_tokens=300, settings={"temperature": 1.0}))
    next(iter(first))
    second = DrawRequest("in between", seed=4)
    ensure_same(second, engine.submit(second).result(60), alone(tiny, second))
    ensure_same(first.request, first.result(60), alone(tiny, first.request))  # type: ignore[arg-type]
    shut(engine)


def test_events_of_an_answer(engine: Engine) -> None:
    job = engine.submit(AnswerRequest("hello", max_new_tokens=9, seed=2, settings={"temperature": 1.0}))
    *deltas, finished = job
    assert isinstance(finished, Finished)
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)).strip() == finished.result
    assert 0 <= finished.timing.started <= finished.timing.first <= finished.timing.finished
    assert list(job) == [*deltas, finished]  # again, from the first
    assert job.done


def test_a_first_token_beside_drawings_takes_few_steps_also_where_it_is_no_letter(tiny: Janus) -> None:
    """The tiny model's random bytes are seldom a text, which follows the first token by some steps."""
    with Engine(tiny, rows=24) as engine:
        for seed in range(8):
            drawings = [engine.submit(DrawRequest(f"drawing {i}", seed=i)) for i in range(8)]
            for drawing in drawings:
                next(event for event in drawing if isinstance(event, Progress))
            request = AnswerRequest("hello?", max_new_tokens=2, seed=seed, settings={"temperature": 1.0})
            [*_, finished] = engine.submit(request)
            assert isinstance(finished, Finished)
            assert finished.timing.first_steps <= 3  # of 213 positions, 128 are read before a step


def test_events_of_a_drawing(tiny: Janus, engine: Engine) -> None:
    events = list(engine.submit(DrawRequest("a cat", n=2, seed=1, partial_images=3)))
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted(range(1, 33))
    assert {event.total for event in progress} == {32}
    partial = [event for event in events if isinstance(event, PartialImage)]
    assert sorted((event.index, event.number) for event in partial) == [
        (i, k) for i in (0, 1) for k in range(3)
    ]
    finished = events[-1]
    assert isinstance(finished, Finished)
    last = finished.result
    codes = last.encoded[0]  # type: ignore[union-attr]
    assert codes is not None
    [second] = [event for event in partial if (event.index, event.number) == (0, 1)]
    ensure_decoded(tiny, second, codes, known=16 * 2 // 5)


def ensure_decoded(tiny: Janus, event: PartialImage, codes: Any, *, known: int) -> None:
    """Check that an image was decoded after so many codes; the last is repeated."""
    filled = np.concatenate([codes[:known], np.repeat(codes[known - 1], 16 - known)])
    expected = tiny.model.generation.decode_image(torch.from_numpy(filled)[None])[0]
    assert np.array_equal(np.asarray(event.image), expected.permute(1, 2, 0).numpy())


def test_a_partial_image_has_the_codes_of_a_prefix(tiny: Janus, engine: Engine) -> None:
    request = DrawRequest("a cat", partial_images=1, settings={"prefix": [3, 60]})
    events = list(engine.submit(request))
    [partial] = [event for event in events if isinstance(event, PartialImage)]
    ensure_decoded(tiny, partial, events[-1].result.encoded[0], known=4)  # type: ignore[union-attr,index]


def test_events_for_asyncio(tiny: Janus, engine: Engine) -> None:
    requests = mixed_requests(6)

    async def last(request: AnswerRequest | DrawRequest) -> Any:
        return [event async for event in engine.submit(request)][-1].result

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(last, requests))

    for request, result in zip(requests, asyncio.run(all_of_them()), strict=True):
        ensure_same(request, result, alone(tiny, request))


def test_cancelling_frees_rows_and_lets_others_go_on(tiny: Janus, engine: Engine) -> None:
    long = engine.submit(AnswerRequest("on and on", max_new_tokens=400, settings={"temperature": 1.0}))
    other = engine.submit(DrawRequest("a cat", n=3))
    next(iter(long))
    long.cancel()
    with pytest.raises(RequestCancelledError, match=long.request_id):
        long.result(60)
    with pytest.raises(RequestCancelledError):
        list(long)
    ensure_same(other.request, other.result(60), alone(tiny, other.request))  # type: ignore[arg-type]
    assert engine.stats().cancelled == 1
    shut(engine)


def test_a_deadline_ends_a_request(engine: Engine) -> None:
    late = engine.submit(AnswerRequest("a", max_new_tokens=400, deadline=0.0))
    with pytest.raises(DeadlineError, match=r"after 0\.0 s, its deadline"):
        late.result(60)
    assert engine.stats().failed == 1
    shut(engine)


def test_waiting_for_a_result_has_a_limit_of_its_own(engine: Engine) -> None:
    job = engine.submit(AnswerRequest("a", max_new_tokens=400, settings={"temperature": 1.0}))
    with pytest.raises(DeadlineError, match="it goes on"):
        job.result(timeout=0)
    assert job.result(60)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (AnswerRequest("a", max_new_tokens=500), r"up to 304 tokens.*max_seq_len of the engine"),
        (AnswerRequest("a" * 600), r"takes 807 positions; the context has 512"),
        (AnswerRequest("a", settings={"heat": 1}), "heat: no such setting"),
        (AnswerRequest("a", settings={"temperature": -1}), "temperature: found -1"),
        (AnswerRequest("a", stop="."), "stop: found '.'"),
        (DrawRequest("a" * 260), r"up to 16 positions of an image"),
        (DrawRequest("a", n=0), "n: found 0"),
        (DrawRequest("a", size=(60, 64)), r"size: found 64x60; the model draws 32x32 and not this"),
        (DrawRequest("a", guidance=float("nan")), "guidance: found nan"),
        (DrawRequest("a", partial_images=9), "partial_images: found 9; expected 0 to 8"),
        (DrawRequest(["a"]), "prompt: found"),  # type: ignore[arg-type]
        ("a", "expected an AnswerRequest or a DrawRequest"),
        (AnswerRequest("a", deadline="5"), "deadline: found '5'"),  # type: ignore[arg-type]
        (AnswerRequest("a", deadline=float("nan")), "deadline: found nan"),
        (DrawRequest("a", deadline=-1), "deadline: found -1"),
        (DrawRequest("a", request_id=5), "request_id: found 5"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_refused_at_once(tiny: Janus, request_: Any, message: str) -> None:
    with Engine(tiny, rows=2, max_seq_len=256) as engine, pytest.raises(PromptError, match=message):
        engine.submit(request_)
    assert engine.stats().waiting == 0


def test_a_drawing_that_needs_more_rows_than_there_are_fails(tiny: Janus) -> None:
    with Engine(tiny, rows=1) as engine:
        with pytest.raises(PromptError, match=r"2 rows at a time; the engine has 1"):
            engine.submit(DrawRequest("a cat")).result(60)
        assert engine.submit(DrawRequest("a cat", guidance=1)).result(60)
        shut(engine)


def test_a_full_queue_refuses_requests(tiny: Janus) -> None:
    engine = Engine(tiny, rows=1, queue_size=2)
    request = AnswerRequest("a", max_new_tokens=300, settings={"temperature": 1.0})
    jobs = [engine.submit(request)]
    next(iter(jobs[0]))  # it has the only row
    jobs += [engine.submit(request) for _ in range(2)]
    with pytest.raises(QueueFullError, match=r"expected fewer than 2\. Try again in") as caught:
        engine.submit(request)
    assert caught.value.retry_after >= 1
    engine.close(drain=False)
    for job in jobs:
        with pytest.raises(RequestCancelledError):
            job.result(0)


def test_an_id_is_taken_until_its_request_is_done(engine: Engine) -> None:
    request = AnswerRequest("a", max_new_tokens=200, request_id="mine", settings={"temperature": 1.0})
    job = engine.submit(request)
    assert job.request_id == "mine"
    with pytest.raises(PromptError, match="'mine', which is running"):
        engine.submit(request)
    assert job.result(60) == engine.submit(request).result(60)


def test_a_closed_engine_finishes_its_requests_and_takes_no_others(tiny: Janus) -> None:
    engine = Engine(tiny, rows=4)
    jobs = [engine.submit(request) for request in mixed_requests(8)]
    engine.close()
    assert all(job.done and job.result() for job in jobs)
    with pytest.raises(ServingError, match="closed"):
        engine.submit(AnswerRequest("a"))
    engine.close()


def test_closing_waits_no_longer_than_it_may(tiny: Janus) -> None:
    engine = Engine(tiny, rows=1)
    job = engine.submit(AnswerRequest("a", max_new_tokens=400, settings={"temperature": 1.0}))
    engine.close(timeout=0)
    assert job.done


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 0}, PromptError, "rows: found 0"),
        ({"max_seq_len": 0}, PromptError, "max_seq_len: found 0"),
        ({"scheduler": "fare"}, ConfigError, "Did you mean 'fair'"),
        ({"scheduler": {"name": "fair", "chunk": 0}}, ConfigError, "chunk: found 0"),
        ({"max_seq_len": 4096}, PromptError, "max_seq_len: found 4096; expected 512"),
    ],
)
def test_wrong_options_are_refused(
    tiny: Janus, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Engine(tiny, **options)


def test_a_sampler_that_raises_fails_alone(
    tiny: Janus, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of calls that are joined, and of steps that are made together."""
    from janus_modular.model.session import TorchSession

    run: Callable[..., Any] = TorchSession.run

    def failing(self: Any, name: str, *inputs: Any) -> Any:
        if name == "sample_text" and float(np.asarray(inputs[2])) == np.float32(1.7):
            raise RuntimeError("no such temperature")
        return run(self, name, *inputs)

    monkeypatch.setattr(TorchSession, "run", failing)
    good = [AnswerRequest(f"{i}", max_new_tokens=20, settings={"temperature": 1.0}) for i in range(3)]
    jobs = [engine.submit(request) for request in good]
    bad = engine.submit(AnswerRequest("bad", max_new_tokens=20, settings={"temperature": 1.7}))
    with pytest.raises(RuntimeError, match="no such temperature"):
        bad.result(60)
    for job in jobs:
        ensure_same(job.request, job.result(60), alone(tiny, job.request))  # type: ignore[arg-type]
    shut(engine)


def test_a_step_that_raises_for_a_row_fails_that_request_alone(
    tiny: Janus, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from janus_modular.model.session import TorchSession

    extend: Callable[..., Any] = TorchSession.extend_rows
    broken = len(tiny.processor.chat_prompt([*_conversation("a longer one, so that it is known")]))

    def failing(self: Any, x: Any, counts: Any, first_row: int) -> Any:
        before = self.lengths[first_row : first_row + len(counts)]
        if ((before == broken + 3) & (np.asarray(counts) > 0)).any():
            raise MemoryError("row of a certain length")
        return extend(self, x, counts, first_row)

    monkeypatch.setattr(TorchSession, "extend_rows", failing)
    good = [AnswerRequest(f"{i}", max_new_tokens=6, settings={"temperature": 1.0}) for i in range(3)]
    jobs = [engine.submit(request) for request in good]
    bad = engine.submit(
        AnswerRequest("a longer one, so that it is known", max_new_tokens=9, settings={"temperature": 1.0})
    )
    with pytest.raises(MemoryError, match="certain length"):
        bad.result(60)
    for job in jobs:
        ensure_same(job.request, job.result(60), alone(tiny, job.request))  # type: ignore[arg-type]
    shut(engine)


def _conversation(text: str) -> list[Any]:
    from janus_modular import arguments

    return arguments.conversation(text, ())


def test_asynchronous_calls_give_what_calls_give(tiny: Janus) -> None:
    janus = Janus.of(tiny.assembly)

    async def calls() -> tuple[Any, Any, str]:
        sampled = {"temperature": 1.0, "max_tokens": 9}
        answer, drawings = await asyncio.gather(
            janus.achat("hello", seed=1, **sampled), janus.adraw("a cat", 2, seed=3, guidance=2.0)
        )
        texts = [text async for text in janus.astream("hello", seed=1, **sampled)]
        return answer, drawings, "".join(texts).strip()

    answer, drawings, text = asyncio.run(calls())
    assert answer == text == tiny.chat("hello", seed=1, temperature=1.0, max_tokens=9)
    assert np.array_equal(drawings.encoded, tiny.draw("a cat", 2, seed=3, guidance=2.0).encoded)
    with pytest.raises(ConfigError, match="an engine that is running"):
        janus.start_engine(rows=2)
    shut(janus.engine)
    assert janus.start_engine(rows=2).rows == 2
    janus.engine.close()


def test_a_cancelled_asynchronous_call_frees_its_rows(tiny: Janus) -> None:
    janus = Janus.of(tiny.assembly)

    async def cancelled() -> None:
        stream = janus.astream("on and on", max_tokens=400, temperature=1.0)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        task = asyncio.create_task(janus.achat("on and on", max_tokens=400, temperature=1.0))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(cancelled())
    janus.engine.close(drain=True)
    assert janus.engine.stats().cancelled >= 1
    assert not janus.engine.session.lengths.any()


@pytest.mark.parametrize("rows", [2, 6])
def test_drawings_by_rectified_flow_run_beside_answers(rows: int) -> None:
    """Their unconditional rows hide positions, which other prompts in the same rows later do not."""
    torch.manual_seed(0)
    flow = Janus.of(ModelAssembly.from_config(resolve(load("tiny_flow"), ModelConfig)))
    drawings = [DrawRequest(f"a cat {i}", seed=i, settings={"steps": 3}) for i in range(4)]
    answers = [AnswerRequest(f"{SYSTEM}Question {i}?", max_new_tokens=5) for i in range(8)]
    with Engine(flow, rows=rows) as engine:
        drawing_jobs = [engine.submit(request) for request in drawings]
        answer_jobs = [engine.submit(request) for request in answers]
        for request, job in zip(answers, answer_jobs, strict=True):
            ensure_same(request, job.result(60), alone(flow, request))
        for request, job in zip(drawings, drawing_jobs, strict=True):
            expected = flow.draw(request.prompt, seed=request.seed, steps=3)
            encoded, encoded_alone = job.result(60).encoded, expected.encoded  # type: ignore[union-attr]
            # Numbers of size 1 in float32, which sums in another order for other shapes.
            np.testing.assert_allclose(encoded[0], encoded_alone[0], rtol=0, atol=1e-5)  # type: ignore[index]
