"""Records of a prompt and a generated image, and roles and keys of further data sets."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from janus_modular import DataError

from .conftest import shape

RNG = np.random.default_rng


@pytest.mark.parametrize(
    ("more", "inputs"),
    [
        ({}, []),
        ({"input_image": None}, []),
        ({"input_image": []}, []),
        ({"input_image": "a.png"}, [("read", 10)]),
        (
            {"input_image": ["a.png", "b.png"], "input_image_resolution": [4, 3]},
            [("read", 10), ("read", 200)],
        ),
    ],
)
def test_prompts_with_generated_images(read: Any, more: dict[str, Any], inputs: list[Any]) -> None:
    record = {"input_prompt": "Draw.", "output_image": "b.png", "output_image_resolution": [4, 3], **more}
    expected = [("user", [*inputs, ("Draw.", False)]), ("assistant", [("draw", 200, True)])]
    for options in ({}, {"task": "draw", "templates": ["no effect: {}"]}):
        assert shape(read(record, **options).sample(0, RNG(0))) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_prompt": "a"}, "has no output_image; expected input_prompt and output_image"),
        ({"output_image": "a.png"}, "has no input_prompt; expected input_prompt and output_image"),
        (
            {"input_prompt": "a", "output_image": ["a.png", "b.png"]},
            r"output_image: found \['a.png', 'b.png'\]",
        ),
        ({"input_prompt": "a", "output_image": "c.png"}, r"c\.png' is not there"),
        ({"input_prompt": "<image>", "output_image": "a.png"}, "input_prompt: holds '<image>'"),
        ({"input_prompt": "a", "output_image": "a.png", "caption": "b"}, "unknown keys 'caption'"),
        ({"input_prompt": "a", "output_images": "a.png"}, "Did you mean 'output_image'"),
    ],
)
def test_prompts_that_cannot_be_used(read: Any, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl, line 1: .*{message}"):
        read(record).sample(0, RNG(0))


def test_a_llava_file_of_several_forms(read: Any) -> None:
    """An array with images as a string and as a list, without an image, and with the marker at the end."""
    asked = {"from": "human", "value": "What?\n<image>"}
    array = [
        {"id": "1", "image": "a.png", "conversations": [asked, {"from": "gpt", "value": "A."}]},
        {
            "id": 2,
            "data_source": "x",
            "image": ["b.png"],
            "conversations": [asked, {"from": "gpt", "value": "B."}],
        },
        {
            "id": "3",
            "model": "",
            "conversations": [{"from": "user", "value": "Q"}, {"from": "bot", "value": "C."}],
        },
    ]
    data = read(raw=json.dumps(array), name="llava.json")
    assert [shape(data.sample(i, RNG(0))) for i in range(3)] == [
        [("user", [("What?\n", False), ("read", 10)]), ("assistant", [("A.", True)])],
        [("user", [("What?\n", False), ("read", 200)]), ("assistant", [("B.", True)])],
        [("user", [("Q", False)]), ("assistant", [("C.", True)])],
    ]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_system_texts_by_either_name(read: Any, role: str) -> None:
    turns = [{"role": role, "content": "Be brief."}, {"role": "assistant", "content": "Yes."}]
    assert shape(read({"messages": turns}).sample(0, RNG(0)))[0] == ("system", [("Be brief.", False)])
