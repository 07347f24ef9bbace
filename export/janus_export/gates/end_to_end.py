"""Gates that run everything: whole answers and whole drawings, through the samplers that users run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL.Image import Image

from janus_export.reference.prompts import (
    DRAWING,
    DRAWN,
    known_settings,
    listen_to_answers,
    listen_to_drawings,
)
from janus_export.reference.recording import Run
from janus_export.reference.target import Check, Subject
from janus_modular.janus import Janus


def answer(subject: Subject) -> Iterator[Check]:
    """Answer greedily, three ragged questions side by side, two of them about images."""
    if not (subject.is_exact and subject.has("text")):
        return
    texts, want = subject.reference.greedy
    reference = subject.reference
    said, got = listen_to_answers(subject.whole, reference.processor, reference.asked)
    yield _same_choices("greedy answers: tokens", got, want)
    yield Check("greedy answers: texts", said == texts, repr(said)[:80], repr(texts)[:80])


def drawing(subject: Subject) -> Iterator[Check]:
    """Draw two images under guidance with the same noise.

    Who listens makes a runtime wait after every step. One that would run ahead of the host (and join steps
    into a graph) draws once more unheard, which must change nothing; in whatever precision.
    """
    unheard = subject.whole is not subject.runtime
    if not (subject.is_exact or unheard) or not subject.has("drawing"):
        return
    processor = subject.reference.processor
    images, got = listen_to_drawings(subject.whole, processor)
    if subject.is_exact:
        expected, want = subject.reference.drawn
        yield _same_choices("a whole drawing: codes", got, want)
        yield _same_pixels("a whole drawing: pixels", images, expected)
    if unheard:
        settings = known_settings("image_samplers", subject.whole.image_sampler, DRAWING)
        again = Janus(subject.whole, processor).draw(DRAWN, **settings)
        yield _same_pixels("the same drawing, nobody listening: pixels", again, images)


def _same_pixels(what: str, got: list[Image], want: list[Image]) -> Check:
    off = max(
        int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())
        for one, other in zip(got, want, strict=True)
    )
    return Check(what, off <= 1, f"{off} of 255 apart", "at most 1")


def _same_choices(what: str, got: Run, want: Run) -> Check:
    """Compare what steps chose, for rows that go on."""
    if len(got.chosen) != len(want.chosen):
        return Check(what, False, f"{len(got.chosen)} steps", f"{len(want.chosen)} steps")
    off = 0
    for step, (one, other) in enumerate(zip(got.chosen, want.chosen, strict=True)):
        active = want.active(step)[: len(other)]
        off += int((one != other)[active].sum())
    total = sum(one.size for one in want.chosen)
    return Check(what, off == 0, f"{off} of {total} differ", "none")
