"""Processors with the reference tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular.interfaces import PixelSpec
from janus_modular.processing.processor import Drawing, Processor
from janus_modular.processing.tokenizer_files import load_tokenizer
from janus_modular.sequence import IGNORE_INDEX, Sequence


@pytest.fixture
def reference() -> Path:
    return Path(__file__).parents[2] / "fixtures" / "reference"


@pytest.fixture
def make(reference: Path) -> Callable[..., Processor]:
    """Make a processor of small images: 4 positions to read one, 3 to draw one."""

    def make(template: str = "janus-pro", source: Path | str = reference, **options: Any) -> Processor:
        tokenizer = load_tokenizer(source, published=template.startswith("janus"))
        options = {"image_tokens": 4, "drawing": Drawing(8, 8, 3), **options}
        return Processor(tokenizer, template, pixels=PixelSpec(height=16, width=16), **options)

    return make


@pytest.fixture
def image() -> Callable[..., Image.Image]:
    return lambda value=0: Image.fromarray(np.full((9, 7, 3), value, np.uint8))


@pytest.fixture
def words() -> Callable[..., str]:
    """Decode ids with special tokens shown."""
    return lambda processor, ids: processor.tokenizer.core.decode(
        [int(id) for id in ids], skip_special_tokens=False
    )


@pytest.fixture
def learned(words: Callable[..., str]) -> Callable[[Processor, Sequence], str]:
    """Say what the labels say."""
    return lambda processor, sequence: words(processor, sequence.labels[sequence.labels != IGNORE_INDEX])
