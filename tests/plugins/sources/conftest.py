"""A folder of images, and records in a file beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from janus_modular import ImageInput, ImageTarget, Sample, Text
from janus_plugins.sources.jsonl import Jsonl, JsonlConfig


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.png and b.png, of grey 10 and 200."""
    for name, grey in {"a": 10, "b": 200}.items():
        Image.new("RGB", (4, 3), (grey, grey, grey)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def read(images: Path) -> Callable[..., Jsonl]:
    """Open records as a source: as lines, or what ``raw`` says, in a file of any name."""

    def build(*records: Any, raw: str | None = None, name: str = "data.jsonl", **options: Any) -> Jsonl:
        text = "\n".join(map(json.dumps, records)) if raw is None else raw
        (images / name).write_text(text, "utf-8")
        return Jsonl(JsonlConfig(path=str(images / name), **options))

    return build


def shape(sample: Sample) -> list[tuple[str, list[object]]]:
    """Return a sample as roles and segments: texts with whether they are learned, images by their grey."""

    def shape_of(segment: object) -> object:
        if isinstance(segment, Text):
            return segment.text, segment.supervised
        assert isinstance(segment, ImageInput | ImageTarget)
        grey = segment.image.getpixel((0, 0))[0]
        return ("read", grey) if isinstance(segment, ImageInput) else ("draw", grey, segment.supervised)

    return [(m.role, [shape_of(s) for s in m.content]) for m in sample.messages]
