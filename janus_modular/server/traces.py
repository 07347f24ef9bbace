"""Spans of OpenTelemetry for each answer and drawing: where its time went, and nothing of its content.

Names are those of the semantic conventions for generative AI; spans go to the collector that the variables
``OTEL_EXPORTER_OTLP_ENDPOINT`` and the like name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from janus_modular import __version__
from janus_modular.answers import Answer, Drawings
from janus_modular.serving import AnswerRequest, DrawRequest, Finished

PROVIDER = "janus_modular"
PARTS = ("prepare", "queue", "prefill", "steps", "decode")
"""Of a request: its prompt is prepared, waits for rows and is read; tokens or codes follow, then pixels."""
SAMPLED = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed"}
"""Settings of samplers, and the conventions' names below ``gen_ai.request``."""


class Traces:
    """Makes the spans of a server, and sends them in the background."""

    def __init__(self, model: str, exporter: SpanExporter | None = None) -> None:
        """``exporter``: where spans go; None: to a collector, by OTLP over HTTP."""
        self._model = model
        self._provider = TracerProvider(resource=Resource.create({"service.version": __version__}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("janus_modular", __version__)

    def begin(
        self, request: AnswerRequest | DrawRequest, request_id: str, headers: Mapping[str, str]
    ) -> RequestSpans:
        """Begin the span of a request, below the client's span if its headers name one."""
        is_answer = isinstance(request, AnswerRequest)
        operation = "chat" if is_answer else "generate_content"
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": operation,
            "gen_ai.output.type": "text" if is_answer else "image",
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "janus.request_id": request_id,
        }
        if isinstance(request, DrawRequest):
            attributes["gen_ai.request.choice.count"] = request.n
        elif request.max_new_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = request.max_new_tokens
        begin = time.time_ns()
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            propagate.extract(headers),
            SpanKind.SERVER,
            attributes,
            start_time=begin,
        )
        return RequestSpans(self, span, begin)

    def part(self, parent: Span, name: str, start: int, end: int) -> None:
        """Add the span of a part of a request, from and to a time in nanoseconds."""
        part = self._tracer.start_span(name, set_span_in_context(parent), start_time=start)
        part.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class RequestSpans:
    """The span of a request, and those of its parts, which are made when it ends."""

    def __init__(self, traces: Traces, span: Span, begin: int) -> None:
        self._traces, self._span = traces, span
        self._begin = self._submitted = begin  # nanoseconds

    def submitted(self) -> None:
        """Note that the prompt is prepared, and the request in the queue."""
        self._submitted = time.time_ns()

    def finish(self, finished: Finished) -> None:
        """End the span with the result's usage, and the spans of its parts."""
        if not self._span.is_recording():
            return
        timing, result = finished.timing, finished.result
        times = [timing.started, timing.first, timing.last, timing.finished]
        ends = [self._submitted, *(self._submitted + round(seconds * 1e9) for seconds in times)]
        for name, (start, end) in zip(PARTS, pairwise([self._begin, *ends]), strict=True):
            self._traces.part(self._span, name, start, end)
        self._span.set_attributes(_usage(result))
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", timing.first)
        self._span.set_attributes(
            {
                f"gen_ai.request.{name}": value
                for setting, name in SAMPLED.items()
                if isinstance(value := result.settings.get(setting), int | float)
            }
        )
        self._span.end(ends[-1])

    def fail(self, error: str) -> None:
        """End the span with the name of an error; without effect after its end."""
        if self._span.is_recording():
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
            self._span.end()


def _usage(result: Answer | Drawings) -> dict[str, AttributeValue]:
    if isinstance(result, Answer):
        return {
            "gen_ai.usage.input_tokens": result.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": result.usage.completion_tokens,
            "gen_ai.response.finish_reasons": [result.finish_reason or "stop"],
        }
    return {
        "gen_ai.usage.input_tokens": sum(usage.prompt_tokens for usage in result.usage),
        "gen_ai.usage.output_tokens": sum(usage.image_tokens for usage in result.usage),
    }
