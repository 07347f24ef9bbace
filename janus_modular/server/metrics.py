"""Metrics for Prometheus, with vLLM's names as aliases, so that routers and dashboards made for it work."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from janus_modular.answers import Answer
from janus_modular.serving import EngineStats, Finished

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """What was observed of finished requests; the state of the engine is read when they are collected."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.refused = Counter(
            "janus_refused", "Requests refused: the queue was full", registry=self.registry
        )
        modes = ["mode"]
        self._first = self._histogram(
            "janus_first_token", "From submission to the first token or code", modes
        )
        self._queue = self._histogram("janus_queue", "From submission to the first rows", modes)
        self._request = self._histogram("janus_request", "From submission to the end", modes)
        self._step = Histogram(
            "janus_time_per_token_seconds",
            "Between two tokens of an answer, or two codes of a drawing",
            modes,
            buckets=STEP_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "janus_tokens", "Tokens of answers and codes of drawings", modes, registry=self.registry
        )
        self._prompt_tokens = Counter(
            "janus_prompt_tokens", "Positions of prompts, with images", modes, registry=self.registry
        )
        self._vllm_first = self._histogram("vllm:time_to_first_token", "Alias of janus_first_token_seconds")
        self._vllm_request = self._histogram("vllm:e2e_request_latency", "Alias of janus_request_seconds")
        self._vllm_tokens = Counter(
            "vllm:generation_tokens", "Alias of janus_tokens_total", registry=self.registry
        )
        self._vllm_prompt_tokens = Counter(
            "vllm:prompt_tokens", "Alias of janus_prompt_tokens_total", registry=self.registry
        )

    def _histogram(self, name: str, text: str, labels: list[str] | None = None) -> Histogram:
        return Histogram(f"{name}_seconds", text, labels or (), buckets=SECONDS, registry=self.registry)

    def observe(self, finished: Finished) -> None:
        """Count a finished request and its times."""
        result, timing = finished.result, finished.timing
        if isinstance(result, Answer):
            mode, usages = "answer", [result.usage]
            tokens = steps = result.usage.completion_tokens
        else:
            mode, usages = "draw", result.usage
            tokens = sum(usage.image_tokens for usage in usages)
            steps = usages[0].image_tokens if usages else 0
        prompt_tokens = sum(usage.prompt_tokens for usage in usages)
        self._queue.labels(mode).observe(timing.started)
        self._first.labels(mode).observe(timing.first)
        self._request.labels(mode).observe(timing.finished)
        if steps > 1:
            self._step.labels(mode).observe((timing.finished - timing.first) / (steps - 1))
        self._tokens.labels(mode).inc(tokens)
        self._prompt_tokens.labels(mode).inc(prompt_tokens)
        self._vllm_first.observe(timing.first)
        self._vllm_request.observe(timing.finished)
        self._vllm_tokens.inc(tokens)
        self._vllm_prompt_tokens.inc(prompt_tokens)

    def text(self, stats: EngineStats) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        engine = CollectorRegistry()
        engine.register(_EngineCollector(stats))
        return generate_latest(engine) + generate_latest(self.registry)


class _EngineCollector(Collector):
    """The state of an engine as metrics."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Yield the metrics."""
        stats = self._stats
        used = stats.answer_rows + stats.draw_rows
        gauges = {
            "janus_requests_running": ("Requests that have rows", stats.running),
            "janus_requests_waiting": ("Requests that wait for rows", stats.waiting),
            "vllm:num_requests_running": ("Alias of janus_requests_running", stats.running),
            "vllm:num_requests_waiting": ("Alias of janus_requests_waiting", stats.waiting),
            "vllm:kv_cache_usage_perc": ("Share of the rows that are in use", used / stats.rows),
            "vllm:gpu_cache_usage_perc": ("The former name of vllm:kv_cache_usage_perc", used / stats.rows),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        rows = GaugeMetricFamily("janus_rows", "Rows of the batch by use", labels=["mode"])
        by_mode = {"answer": stats.answer_rows, "draw": stats.draw_rows, "free": stats.rows - used}
        for mode, count in by_mode.items():
            rows.add_metric([mode], count)
        yield rows
        requests = CounterMetricFamily("janus_requests", "Requests that ended", labels=["outcome"])
        outcomes = {
            "answered": stats.answered,
            "drawn": stats.drawn,
            "failed": stats.failed,
            "cancelled": stats.cancelled,
        }
        for outcome, count in outcomes.items():
            requests.add_metric([outcome], count)
        yield requests
        counters = {
            "janus_steps": ("Steps of the backbone", stats.steps),
            "janus_prompt_positions": ("Positions of prompts that were read", stats.prompt_positions),
            "janus_continued_codes": ("Codes of drawings taken from the journal", stats.continued_codes),
            "janus_reused_positions": ("Positions of prompts that were copied", stats.reused_positions),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
