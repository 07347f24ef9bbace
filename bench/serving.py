"""Compares an engine with one call after another: throughput, overhead, first results, and an idle server.

    python bench/serving.py [MODEL|BUNDLE] [--rows 24] [--repeats 5]

Without a model, the tiny one with random weights is measured, in torch and exported.

Times are of the processor, all threads of the process: other work on the machine does not count. Both sides
run in turn, in one process, and the least of several repetitions counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from served_models import make_tiny

from janus_modular import Janus
from janus_modular.server.run import serving_in_background
from janus_modular.server.settings import ServerConfig
from janus_modular.serving import AnswerRequest, DrawRequest, Engine, Progress

TOKENS = 32
"""Of an answer."""


def requests(count: int) -> list[AnswerRequest | DrawRequest]:
    """Return answers and drawings in turn, each with a prompt and a seed of its own."""
    return [
        DrawRequest(f"a drawing of number {i}", seed=i)
        if i % 2
        else AnswerRequest(f"question {i}?", seed=i, max_new_tokens=TOKENS, settings={"temperature": 1.0})
        for i in range(count)
    ]


def alone(janus: Janus, request: AnswerRequest | DrawRequest) -> Any:
    """Run a request without an engine."""
    if isinstance(request, DrawRequest):
        return janus.draw(request.prompt, seed=request.seed)
    return janus.chat(
        str(request.prompt), seed=request.seed, max_tokens=request.max_new_tokens, **request.settings
    )


def in_turn(repeats: int, *actions: Callable[[], object]) -> list[float]:
    """Return the least processor time of each action, in seconds."""
    times: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for measured, action in zip(times, actions, strict=True):
            start = time.process_time()
            action()
            measured.append(time.process_time() - start)
    return [min(measured) for measured in times]


def steps_to_first_token(janus: Janus, rows: int, repeats: int) -> int:
    """Return the most steps of the batch from a question to its first token, while 8 images are drawn."""
    steps = []
    for _ in range(repeats):
        with Engine(janus, rows) as engine:  # with an empty prefix cache
            drawings = [engine.submit(DrawRequest(f"drawing {i}", seed=i)) for i in range(8)]
            for drawing in drawings:
                next(event for event in drawing if isinstance(event, Progress))
            [*_, finished] = engine.submit(AnswerRequest("hello?", max_new_tokens=TOKENS))
            steps.append(finished.timing.first_steps)
    return max(steps)


def first_partial_image(janus: Janus, repeats: int) -> float:
    """Return when the first partial image of a drawing that is alone is there: a share of its time."""
    shares = []
    with Engine(janus, 2) as engine:
        for seed in range(repeats):
            times, start = dict[str, float](), time.perf_counter()
            for event in engine.submit(DrawRequest("a drawing", seed=seed, partial_images=1)):
                times[type(event).__name__] = time.perf_counter() - start
            shares.append(times["PartialImage"] / times["Finished"])
    return median(shares)


def idle_share(janus: Janus, seconds: float = 10) -> float:
    """Return the share of a core that a server without requests uses, once it is warm."""
    with serving_in_background(janus, ServerConfig(port=0, warm_up=False), "model"):
        time.sleep(1)
        start = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - start) / seconds


def measure(janus: Janus, options: argparse.Namespace) -> None:
    """Measure a model, and print the figures."""
    many = requests(options.concurrent)
    with Engine(janus, options.rows) as engine:

        def together(wanted: list[AnswerRequest | DrawRequest]) -> list[Any]:
            return [job.result() for job in [engine.submit(request) for request in wanted]]

        first = [alone(janus, request) for request in many]
        same = sum(
            str(a) == str(b) if isinstance(a, str) else (a.encoded[0] == b.encoded[0]).all()
            for a, b in zip(first, together(many), strict=True)
        )
        serial, batched = in_turn(
            options.repeats, lambda: [alone(janus, request) for request in many], lambda: together(many)
        )
        print(
            f"{len(many)} requests: one after another {serial:.3f} s, engine {batched:.3f} s,"
            f" {serial / batched:.2f} times; {same} of {len(many)} results the same"
        )
        for name, request in (("answer", many[0]), ("drawing", many[1])):
            bare, served = in_turn(
                4 * options.repeats,
                lambda request=request: alone(janus, request),
                lambda request=request: together([request]),
            )
            print(
                f"one {name}: alone {1e3 * bare:.2f} ms, engine {1e3 * served:.2f} ms,"
                f" {served / bare - 1:+.1%}"
            )
    steps = steps_to_first_token(janus, options.rows, options.repeats)
    print(f"steps to the first token beside 8 drawings: {steps}")
    print(f"first partial image: after {first_partial_image(janus, options.repeats):.0%} of an image's time")
    print(f"a server without requests: {idle_share(janus):.2%} of a core")


def main() -> None:
    """Measure all models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--runtime", default=None)
    options = parser.parse_args()
    runtime = {"name": options.runtime, "threads": 1} if options.runtime else None
    with tempfile.TemporaryDirectory() as temporary:
        models = {options.model: runtime}
        if options.model is None:
            checkpoint, bundle = Path(temporary, "checkpoint"), Path(temporary, "bundle")
            make_tiny(checkpoint, bundle)
            models = {checkpoint: None, bundle: {"name": "onnx", "threads": 1}}
        for path, chosen in models.items():
            janus = Janus.from_pretrained(path, runtime=chosen, allow_failed=True)
            print(f"{path.name}, {type(janus.runtime).__name__}")
            measure(janus, options)


if __name__ == "__main__":
    main()
