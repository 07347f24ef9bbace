"""Compares an engine with one call after another: throughput, time to the first token, and overhead.

    python bench/serving.py MODEL|BUNDLE [--rows 16] [--repeats 5]

Times are of the processor, all threads of the process: other work on the machine does not count. Both sides
run in turn, in one process, and the least of several repetitions counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from janus_modular import Janus
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


def steps_to_first_token(janus: Janus, rows: int) -> int:
    """Return the steps of the batch from a question's submission to its first token, beside 8 drawings."""
    with Engine(janus, rows) as engine:
        drawings = [engine.submit(DrawRequest(f"drawing {i}", seed=i)) for i in range(8)]
        next(event for event in drawings[0] if isinstance(event, Progress) and event.done >= 2)
        [*_, finished] = engine.submit(AnswerRequest("hello?", max_new_tokens=TOKENS))
        return finished.timing.first_steps


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=16)
    parser.add_argument("--runtime", default=None)
    options = parser.parse_args()
    runtime = {"name": options.runtime, "threads": 1} if options.runtime else None
    janus = Janus.from_pretrained(options.model, runtime=runtime)
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
    print(f"steps to the first token beside 8 drawings: {steps_to_first_token(janus, options.rows)}")


if __name__ == "__main__":
    main()
