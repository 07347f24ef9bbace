"""Batch invariance of a bundle's runtimes: a row has the result and max_seq_len that it has alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from janus_modular import Message, Text
from janus_modular.janus import Janus

QUESTIONS = [("It", ()), ("a longer question than the other, with less room behind it", ()), ("why?", ())]
SAMPLED = {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "seed": 6}


@pytest.fixture(params=["onnx", "tensorrt"])
def bundled(request: pytest.FixtureRequest, tiny_bundle: Path) -> Janus:
    if request.param == "onnx":
        return Janus.from_pretrained(tiny_bundle, runtime={"name": "onnx", "threads": 1})
    request.getfixturevalue("machine")
    return Janus.from_pretrained(request.getfixturevalue("built_bundle"), runtime=request.param)


def test_rows_answer_as_they_do_alone(bundled: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest prompt has room for a few tokens; max_tokens is left out, so that the context decides."""
    prompts = [bundled.processor.chat_prompt(_message(text)) for text, _ in QUESTIONS]
    monkeypatch.setattr(bundled.runtime, "context", max(map(len, prompts)) + 3)
    monkeypatch.setattr(bundled.processor, "context", None)
    alone = [bundled.chat(*question, **SAMPLED) for question in QUESTIONS]
    assert alone[1].usage.completion_tokens <= 3 < alone[0].usage.completion_tokens
    for batch in ((1, 0), (2, 1, 0)):
        for answer, i in zip(
            bundled.chat_batch([QUESTIONS[i] for i in batch], **SAMPLED), batch, strict=True
        ):
            assert (answer, answer.finish_reason, answer.usage) == (
                alone[i],
                alone[i].finish_reason,
                alone[i].usage,
            )


def test_rows_draw_as_they_do_alone(bundled: Janus) -> None:
    settings: dict[str, Any] = {"guidance": 3.0, "seed": 2}
    alone = [np.asarray(bundled.draw(text, **settings)[0], int) for text in ("a", "two dogs")]
    together = bundled.draw(["two dogs", "a"], **settings)
    for image, other in zip(together, reversed(alone), strict=True):
        assert np.abs(np.asarray(image, int) - other).max() <= 1  # truncated to 8 bits: a last digit may fall


def _message(text: str) -> list[Message]:
    return [Message("user", [Text(text)])]
