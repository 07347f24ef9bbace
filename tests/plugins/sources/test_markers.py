"""Image markers in the text of a record or a config are never trained as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from janus_modular import DataError
from janus_plugins.records.markers import first_marker

RNG = np.random.default_rng
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
MARKERS = (
    "<image>", "<image_placeholder>", "<Image>", "<IMAGE_1>", "<image1>", "<image 1>", "<image:1>",
    "< image >", "<images>", "</image>", "<img>a.png</img>", "<IMG_CONTEXT>", "<image_soft_token>",
    "<begin_of_image>",
    "<start_of_image>", "<im_patch>", "<|image|>", "<|Image|>", "<|image_1|>", "<|image_start|>",
    "<|begin_of_image|>", "<|vision_start|>", "<|image_pad|>", "<|media_pad|>",
)  # fmt: skip


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_without_an_image_are_errors_in_every_text(read: Any, marker: str) -> None:
    text = f"See {marker} here"
    records = [
        {"text": text},
        {"image": "a.png", "caption": text},
        {"messages": [{**USER, "content": text}, ANSWER]},
        {"messages": [USER, {**ANSWER, "content": [{"type": "text", "text": text}]}]},
        {"messages": [{"role": "system", "content": text}, USER, ANSWER]},
        {"messages": [USER, ANSWER], "system": text},
        {"messages": [USER, ANSWER], "system": text, "images": ["a.png"]},
        {"messages": [USER, {**ANSWER, "reasoning_content": text}]},
    ]
    source = read(*records)
    for i in range(len(records)):
        with pytest.raises(DataError, match=rf"line {i + 1}: .*(?:holds '|positions for images)"):
            source.sample(i, RNG(0))
    source = read(*records[:6], *records[7:], markers="text")
    assert all(source.sample(i, RNG(0)).messages for i in range(len(source)))


@pytest.mark.parametrize("option", ["questions", "templates"])
def test_markers_in_templates_and_questions_are_errors(read: Any, option: str) -> None:
    options: dict[str, Any] = {option: ["{} What?", "<image>\\nWhat is {}?"]}
    with pytest.raises(ValueError, match=r"templates, questions: hold '<image>'.*markers: text"):
        read({"image": "a.png", "caption": "red"}, **options)
    assert len(read({"image": "a.png", "caption": "red"}, markers="text", **options)) == 1


@pytest.mark.parametrize(
    "text", ["<imagine>", "an image", "<|user|>", "<img src='a.png'>", "a < image", "<i>"]
)
def test_similar_text_is_no_marker(text: str) -> None:
    assert first_marker([text]) is None


@pytest.mark.parametrize("nothing", [0, False, {"a": 1}])
@pytest.mark.parametrize("key", ["system", "images", "reasoning_content"])
def test_values_of_another_type_are_errors(read: Any, key: str, nothing: Any) -> None:
    record: dict[str, Any] = {"messages": [USER, dict(ANSWER)]}
    (record["messages"][1] if key == "reasoning_content" else record)[key] = nothing
    with pytest.raises(DataError, match="line 1: "):
        read(record).sample(0, RNG(0))
