"""Spans of requests, by OpenTelemetry's own exporter in memory, and the names of its conventions."""

from __future__ import annotations

from typing import Any

import openai
import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as conventions

from janus_modular.server.settings import ServerConfig
from janus_modular.server.traces import PARTS, Traces

SECRET = "what is the secret?"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(exporter: InMemorySpanExporter, serving: Any, tiny_janus: Any) -> Any:
    """Ask a server by a function that gets a client; return the spans once the server has ended."""

    def ask(act: Any, **settings: Any) -> tuple[ReadableSpan, ...]:
        with serving(tiny_janus, ServerConfig(warm_up=False, **settings)) as served:
            served.service.traces = Traces("tiny", exporter)
            with served.client() as client:
                act(client)
        return exporter.get_finished_spans()

    return ask


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_an_answer_has_spans_of_its_parts_under_the_clients_span(spans: Any):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    completion: Any = None

    def act(client: openai.OpenAI) -> None:
        nonlocal completion
        completion = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": SECRET}],
            max_tokens=5,
            temperature=0.5,
            seed=3,
            extra_headers={"traceparent": parent, "x-request-id": "one"},
        )

    *parts, whole = spans(act)
    assert [part.name for part in parts] == [*PARTS]
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    times = [whole.start_time, *(part.end_time for part in parts)]
    assert times == sorted(times)
    assert [part.start_time for part in parts] == times[:-1]
    assert times[-1] == whole.end_time
    assert f"{whole.context.trace_id:032x}" == parent.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == parent.split("-")[2]
    assert whole.name == "chat tiny"
    found = attributes(whole)
    assert found.pop("gen_ai.response.time_to_first_chunk") > 0
    assert found == {
        "gen_ai.operation.name": conventions.GenAiOperationNameValues.CHAT.value,
        "gen_ai.output.type": conventions.GenAiOutputTypeValues.TEXT.value,
        "gen_ai.provider.name": "janus_modular",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": completion.settings["top_k"],
        "gen_ai.request.top_p": completion.settings["top_p"],
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.input_tokens": completion.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 5,
        "janus.request_id": "one",
    }


def test_a_drawing_has_the_names_of_the_conventions_and_nothing_of_the_prompt(spans: Any):
    *_, whole = finished = spans(
        lambda client: client.images.generate(prompt=SECRET, n=2, extra_body={"seed": 5})
    )
    found = attributes(whole)
    assert found["gen_ai.output.type"] == conventions.GenAiOutputTypeValues.IMAGE.value
    assert found["gen_ai.operation.name"] == conventions.GenAiOperationNameValues.GENERATE_CONTENT.value
    assert (found["gen_ai.request.choice.count"], found["gen_ai.usage.output_tokens"]) == (2, 32)
    known = {value for name, value in vars(conventions).items() if name.startswith("GEN_AI_")}
    assert {name for name in found if name.startswith("gen_ai.")} <= known
    assert not [span for span in finished if SECRET in span.to_json()]


@pytest.mark.parametrize(
    ("deadline", "prompt", "error"), [(1e-9, SECRET, "DeadlineError"), (600.0, SECRET * 30, "PromptError")]
)
def test_what_fails_has_the_name_of_its_error_alone(spans: Any, deadline: float, prompt: str, error: str):
    def act(client: openai.OpenAI) -> None:
        with pytest.raises(openai.APIError):
            client.images.generate(prompt=prompt)

    [span] = spans(act, deadline=deadline)
    assert attributes(span)["error.type"] == error
    assert span.status.is_ok is False
    assert SECRET not in span.to_json()


def test_a_client_that_leaves_ends_the_span(spans: Any):
    def act(client: openai.OpenAI) -> None:
        with client.images.generate(prompt="a", n=8, stream=True, partial_images=3) as stream:
            next(iter(stream))

    [span] = spans(act)
    assert attributes(span)["error.type"] == "cancelled"


def test_there_are_no_spans_by_default(exporter: InMemorySpanExporter, served: Any):
    assert ServerConfig().traces is False
    assert served.service.traces is None
