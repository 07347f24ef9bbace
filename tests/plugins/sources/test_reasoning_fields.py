"""An assistant's reasoning: the field that holds it, and other names of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from janus_modular import DataError, Text

from .test_record_forms import chat

RNG = np.random.default_rng


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_supervised_with_its_turn(read: Any, key: str) -> None:
    record = chat("2 + 2?")
    record["messages"][1][key] = "two and two"
    _, answer = read(record).sample(0, RNG(0)).messages
    assert answer.reasoning_content == Text("two and two", True)
    record["messages"][1]["weight"] = 0
    _, answer = read(record).sample(0, RNG(0)).messages
    assert answer.reasoning_content == Text("two and two", False)
    record["messages"][0][key] = "hm"
    with pytest.raises(DataError, match=r"messages\[0\]: has reasoning_content, and the role user"):
        read(record).sample(0, RNG(0))
    record["messages"][0][key] = ""
    record["messages"][1][key] = ["two"]
    with pytest.raises(DataError, match=r"messages\[1\]: reasoning_content: found \['two'\]; expected text"):
        read(record).sample(0, RNG(0))


@pytest.mark.parametrize("key", ["thinking", "thought", "thinking_content"])
def test_other_names_of_reasoning_are_errors_with_the_field(read: Any, key: str) -> None:
    record = {
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", key: "a"}]
    }
    with pytest.raises(
        DataError, match=rf"messages\[1\]: found the unknown keys '{key}'.*`reasoning_content`: rename"
    ):
        read(record).sample(0, RNG(0))
