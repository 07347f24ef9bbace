"""A stand-in for a model, which answers from a dictionary, and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from janus_modular.answers import Answer, Usage
from janus_modular.protocols import TextSamplerSettings

IDENTITY = {"sha256": "0" * 64, "dtype": "float32", "runtime": "torch", "variant": None}


@dataclass
class StandIn:
    """Answers by the beginning of the prompt; ``fail_after`` answers it is interrupted."""

    answers: Mapping[str, str]
    fail_after: int | None = None
    batches: list[list[str]] = field(default_factory=list)

    def text_settings(self, settings: Mapping[str, Any]) -> TextSamplerSettings:
        return TextSamplerSettings(**settings)

    def chat_batch(self, pairs: list[tuple[str, Any]], **settings: Any) -> list[Answer]:
        if self.fail_after is not None and sum(map(len, self.batches)) >= self.fail_after:
            raise KeyboardInterrupt
        self.batches.append([question for question, _ in pairs])
        texts = [next(a for q, a in self.answers.items() if question.startswith(q)) for question, _ in pairs]
        return [Answer(text, "stop", Usage(1)) for text in texts]


@pytest.fixture
def stand_in() -> Callable[..., Any]:
    return StandIn


@pytest.fixture
def identity() -> dict[str, Any]:
    return dict(IDENTITY)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder with the images a.png and b.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in {"a.png": "orange", "b.png": "blue"}.items():
        Image.new("RGB", (20, 16), color).save(folder / name)
    return folder
