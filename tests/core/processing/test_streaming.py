"""Streamed text is the text that is decoded at once, and contains no incomplete character."""

from pathlib import Path

import pytest

from janus_modular.processing.streaming import StopRule, TextStream
from janus_modular.processing.text_tokenizer import TextSpan, TextTokenizer
from janus_modular.processing.tokenizer_files import load_tokenizer

TEXTS = ["Hello there, panda.", " 你好，世界 🦊🦊 é!", "\n\n a\tb  ", "👩‍👩‍👧 fin"]


@pytest.fixture(params=["bytes", "reference"])
def tokenizer(request: pytest.FixtureRequest, reference: Path) -> TextTokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else reference, published=True)


def ids(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode([TextSpan(text)]).ids.tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_texts_join_to_the_whole(tokenizer: TextTokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    shown = [stream.push(id) for id in ids(tokenizer, text)]
    assert "".join(shown) == text  # every letter is out once it is whole
    assert not any("\ufffd" in span for span in shown)
    assert stream.finish() == ""


def test_special_tokens_are_not_shown(tokenizer: TextTokenizer) -> None:
    stream = TextStream(tokenizer)
    sequence = [*ids(tokenizer, "a"), tokenizer.special_id("begin_image"), *ids(tokenizer, "b")]
    assert "".join(map(stream.push, sequence)) == "ab"


def test_incomplete_character_comes_at_the_end(tokenizer: TextTokenizer) -> None:
    stream = TextStream(tokenizer)
    fox = ids(tokenizer, "🦊")
    assert [stream.push(id) for id in fox[:-1]] == [""] * (len(fox) - 1)
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.finish() == ""


def test_invalid_bytes_do_not_stall(tokenizer: TextTokenizer) -> None:
    stream = TextStream(tokenizer)
    lone = ids(tokenizer, "é")[0]
    shown = "".join(stream.push(lone) for _ in range(20)) + "".join(map(stream.push, ids(tokenizer, "ok")))
    assert shown.endswith("ok")
    assert "\ufffd" in shown


def test_stops_at_ids(tokenizer: TextTokenizer) -> None:
    eos = tokenizer.special_id("eos")
    assert eos is not None
    stream = TextStream(tokenizer, StopRule((eos,), ("User:",)))
    shown = "".join(map(stream.push, [*ids(tokenizer, "Hi Us"), eos, *ids(tokenizer, "more")]))
    assert shown == "Hi Us"  # held back as a possible stop, given out at the end
    assert stream.stopped


@pytest.mark.parametrize("text", ["Hi.\n\nUser: and", "Hi.\n\nUser:", "Hi.\n\nUsUser:x"])
def test_stops_before_strings(tokenizer: TextTokenizer, text: str) -> None:
    stream = TextStream(tokenizer, StopRule((), ("User:",)))
    shown = "".join(map(stream.push, ids(tokenizer, text))) + stream.finish()
    assert shown == text.split("User:")[0]
    assert stream.stopped


def test_without_stop_rule_all_text_is_returned(tokenizer: TextTokenizer) -> None:
    stream = TextStream(tokenizer, StopRule((), ("User:", "Use!")))
    text = "UUser Users User;Use"
    shown = [stream.push(id) for id in ids(tokenizer, text)]
    assert "".join(shown) + stream.finish() == text
