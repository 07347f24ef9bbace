"""Recorded sessions: what verify cannot replay is an error, never a run that is verified in part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from janus_export.errors import ExportError
from janus_export.reference.recording import RecordingRuntime
from janus_modular.janus import Janus


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("admit", lambda session, prompt, hidden: session.admit([prompt], [1])),
        ("extend", lambda session, prompt, hidden: session.extend(hidden[:, None])),
        ("truncate", lambda session, prompt, hidden: session.truncate([1])),
        ("free", lambda session, prompt, hidden: session.free([0])),
    ],
)
def test_requests_that_are_not_recorded_are_errors(
    tiny_checkpoint: Path, method: str, request_: Callable[..., Any]
) -> None:
    janus = Janus.from_pretrained(tiny_checkpoint, device="cpu")
    prompt = janus.processor.draw_prompt("seven")
    recording = RecordingRuntime(janus.runtime)
    session = recording.open(len(prompt) + 4)
    hidden = session.prefill([prompt])
    session.step(hidden)
    with pytest.raises(
        ExportError, match=rf"session\.{method}\(\), which verify cannot replay; expected prefill"
    ):
        request_(session, prompt, hidden)
    [run] = recording.runs
    assert run.prompts == [prompt]
    assert np.array_equal(run.fed[0][0], session.to_host(hidden))
    assert len(run.hidden) == 2
