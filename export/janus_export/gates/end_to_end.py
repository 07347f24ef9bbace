"""Gates that run everything: whole answers and whole drawings, through the samplers that users run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL.Image import Image

from janus_export.reference.prompts import (
    DRAWING,
    DRAWN,
    known_settings,
    record_answers,
    record_drawings,
)
from janus_export.reference.recording import GraphCall, Run
from janus_export.reference.target import CheckResult, VerificationTarget
from janus_modular.janus import Janus


def answer(target: VerificationTarget) -> Iterator[CheckResult]:
    """Compare greedy answers to a batch of three questions of different lengths, two of them about images."""
    if not (target.is_exact and target.has("text")):
        return
    texts, want = target.reference.greedy
    reference = target.reference
    answers, got = record_answers(target.whole, reference.processor, reference.prompts)
    yield _same_ids("greedy answers: tokens", got, want, ["sample_text"])
    yield CheckResult("greedy answers: texts", answers == texts, repr(answers)[:80], repr(texts)[:80])


def drawing(target: VerificationTarget) -> Iterator[CheckResult]:
    """Draw two images under guidance with the same noise.

    Recording makes a runtime wait after every step. A runtime that otherwise runs ahead of the host (and
    joins steps into a graph) draws again without recording: the images must be the same in any precision.
    """
    unrecorded = target.whole is not target.runtime
    if not (target.is_exact or unrecorded) or not target.has("drawing"):
        return
    processor = target.reference.processor
    images, got = record_drawings(target.whole, processor)
    if target.is_exact:
        expected, want = target.reference.drawn
        if choices := [name for name in target.reference.sampling_graphs if want.calls_of(name)]:
            yield _same_ids("a whole drawing: ids", got, want, choices)
        yield _same_pixels("a whole drawing: pixels", images, expected)
    if unrecorded:
        settings = known_settings("image_samplers", target.whole.image_sampler, DRAWING)
        again = Janus(target.whole, processor).draw(DRAWN, **settings)
        yield _same_pixels("the same drawing, nothing recorded: pixels", again, images)


def _same_pixels(label: str, got: list[Image], want: list[Image]) -> CheckResult:
    off = max(
        int(np.abs(np.asarray(actual, int) - np.asarray(expected, int)).max())
        for actual, expected in zip(got, want, strict=True)
    )
    return CheckResult(label, off <= 1, f"{off} of 255 apart", "at most 1")


def _same_ids(label: str, got: Run, want: Run, graphs: list[str]) -> CheckResult:
    """Compare the ids that these graphs sampled, in active rows."""
    calls, expected = got.calls_of(*graphs), want.calls_of(*graphs)
    if len(calls) != len(expected):
        return CheckResult(label, False, f"{len(calls)} choices", f"{len(expected)} choices")
    differ = total = 0
    for call, expected_call in zip(calls, expected, strict=True):
        for ids, right in zip(call.outputs, expected_call.outputs, strict=True):
            if right.dtype == np.int64:
                differ += int((ids != right)[_sampled_rows(want, expected_call)].sum())
                total += right.size
    return CheckResult(label, differ == 0, f"{differ} of {total} differ", "none")


def _sampled_rows(run: Run, call: GraphCall) -> Any:
    """Return which of the ids (n, ...) that a graph sampled count: those of rows whose states are defined.

    Of a drawing under guidance, the first n states are the conditional rows'.
    """
    read, count = run.read_before(call), len(call.outputs[0])
    valid = np.ones(count, np.bool_) if read is None else read.valid.ravel()[:count]
    return valid if len(valid) == count else slice(None)
