"""Gates that run everything: whole answers and whole drawings, through the loops that users run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from janus_export.verify_subject import Check, Run, Subject, listen_to_answers, listen_to_drawings


def answer(subject: Subject) -> Iterator[Check]:
    """Answer greedily, three ragged questions side by side, two of them about pictures."""
    if not subject.is_exact:
        return
    texts, want = subject.reference.greedy
    said, got = listen_to_answers(subject.whole, subject.reference.processor)
    yield _same_choices("greedy answers: tokens", got, want)
    yield Check("greedy answers: texts", said == texts, repr(said)[:80], repr(texts)[:80])


def drawing(subject: Subject) -> Iterator[Check]:
    """Draw two pictures under guidance with the same noise."""
    if not subject.is_exact:
        return
    expected, want = subject.reference.drawn
    pictures, got = listen_to_drawings(subject.whole, subject.reference.processor)
    yield _same_choices("a whole drawing: codes", got, want)
    off = max(
        int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())
        for one, other in zip(pictures, expected, strict=True)
    )
    yield Check("a whole drawing: pixels", off <= 1, f"{off} of 255 apart", "at most 1")


def _same_choices(what: str, got: Run, want: Run) -> Check:
    """Compare what steps chose, for rows that go on."""
    if len(got.chosen) != len(want.chosen):
        return Check(what, False, f"{len(got.chosen)} steps", f"{len(want.chosen)} steps")
    off = 0
    for step, (one, other) in enumerate(zip(got.chosen, want.chosen, strict=True)):
        active = want.active(step)[: len(other)]
        off += int((one != other)[active].sum())
    total = sum(map(len, want.chosen))
    return Check(what, off == 0, f"{off} of {total} differ", "none")
