"""Arguments of wrong types: each function of the Python API raises an error that names the argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_modular import ConfigError, JanusError, Message, PromptError, Text
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus


@pytest.fixture(scope="module")
def janus() -> Janus:
    return Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))


CONVERSATION = [Message("user", [Text("a red square")])]


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("draw", ([*CONVERSATION, "red"],), "prompt: found Message.*one conversation, a list of messages"),
        ("draw", (3,), "prompt: found 3; expected a text, a list of texts, or one conversation"),
        ("draw", (b"red",), "prompt: found b'red'"),
        ("draw", (["red", None],), "found None among the texts"),
        ("draw", ({"text": "red"},), "prompt: found {'text'"),
        ("draw", ("red", 1.5), "n: found 1.5; expected a whole number"),
        ("draw", ("red", True), "n: found True"),
        ("draw", ("red", "2"), "n: found '2'"),
        ("chat", (3,), "found the question 3; expected a text, or a list of Message"),
        ("chat", (None,), "found the question None"),
        ("chat", (b"what?",), "found the question b'what"),
        ("chat", ({"role": "user", "content": "what?"},), "found the question {'role'"),
        ("chat", ([{"role": "user", "content": "what?"}],), r"becomes Message\(role"),
        ("chat", (["what?"],), "found 'what"),
        ("chat", ([Message("user", "what?")],), "found the content 'what"),  # type: ignore[arg-type]
        ("chat", ([Message("user", ["what?"])],), r"expected Text\(\.\.\.\)"),  # type: ignore[list-item]
        ("chat", ("what?", 3), "images: found 3"),
        ("chat", ("what?", {"a": 1}), "images: found {'a': 1}"),
        ("chat_batch", ("what?",), "questions: found 'what"),
        ("chat_batch", (5,), "questions: found 5"),
        ("chat_batch", ([("what?", [], 3)],), "expected a pair"),
        ("chat_batch", ([(3, [])],), "found the question 3"),
        ("save_pretrained", (3,), "folder: found 3"),
        ("save_pretrained", (b"x",), "folder: found b'x'"),
    ],
)
def test_an_argument_of_another_type_is_named(
    janus: Janus, method: str, arguments: tuple[Any, ...], said: str
) -> None:
    with pytest.raises((PromptError, ConfigError), match=said):
        getattr(janus, method)(*arguments)


@pytest.mark.parametrize("stop", ["end", [3], 3, b"end", [""], ["a", ""]])
def test_stop_is_a_list_of_strings(janus: Janus, stop: Any) -> None:
    with pytest.raises(PromptError, match="stop: found"):
        janus.chat("what?", stop=stop)


@pytest.mark.parametrize(("name", "value"), [("batch_size", "8"), ("batch_size", 0), ("progress", 3)])
def test_how_it_is_drawn_is_checked_too(janus: Janus, name: str, value: Any) -> None:
    with pytest.raises(PromptError, match=f"{name}: found"):
        janus.draw("red", **{name: value})


@pytest.mark.parametrize("n", [0, True, 2.0, 10**7, 10**400])
def test_how_many_images_is_a_number_that_there_is_memory_for(janus: Janus, n: Any) -> None:
    with pytest.raises(PromptError, match=r"n: found .* expected a whole number from 1 to 1,000,000"):
        janus.draw("red", n)


@pytest.mark.parametrize("path", ["x" * 5000, "owner/" + "x" * 5000, "a\0b", "~nobody-of-that-name/model"])
def test_a_name_that_no_file_can_have_is_refused(path: str) -> None:
    with pytest.raises(JanusError) as error:
        Janus.from_pretrained(path)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "options",
    [{"path": 3}, {"path": None}, {"path": b"x"}, {"path": "x", "dtype": 16}, {"path": "x", "variant": 1}],
)
def test_what_is_loaded_is_named_by_text_or_path(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(path|dtype|variant): found .*; expected"):
        Janus.from_pretrained(**options)


def test_tuples_and_generators_are_lists_of_texts(janus: Janus, tmp_path: Path) -> None:
    assert len(janus.draw(("a", "b"))) == len(janus.draw(text for text in "ab")) == 2
    with pytest.raises(JanusError):
        Janus.from_pretrained(tmp_path)
