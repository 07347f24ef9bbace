"""The published prompts, to the letter and to the id."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from janus_modular.errors import PromptError
from janus_modular.processing.processor import Drawing, Processor
from janus_modular.processing.templates import UNDERSTANDING_SYSTEM
from janus_modular.sequence import ImageInput, Message, Sample, Segment, Text, unconditional

FIXTURE = Path(__file__).parents[2] / "fixtures" / "reference"
PROMPTS = {prompt["name"]: prompt for prompt in json.loads((FIXTURE / "prompts.json").read_text("utf-8"))}
BEGIN, END, PLACEHOLDER = 4, 5, 6


def messages_of(prompt: dict[str, Any], image: Any) -> list[Message]:
    """Read a conversation as the published code writes it: placeholders in the text."""

    def segments(content: str) -> list[Segment]:
        parsed: list[Segment] = []
        for i, text in enumerate(content.split("<image_placeholder>")):
            parsed += [ImageInput(image)] if i else []
            parsed += [Text(text)] if text else []
        return parsed

    roles = {"User": "user", "<|User|>": "user", "Assistant": "assistant", "<|Assistant|>": "assistant"}
    return [Message(roles[turn["role"]], segments(turn["content"])) for turn in prompt["conversation"]]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str, make: Callable[..., Processor], image: Callable[..., Any]) -> None:
    prompt = PROMPTS[name]
    processor = make("janus-pro" if "<|" in prompt["text"] else "janus")
    messages = messages_of(prompt, image())
    if "generation" in name:
        sequence = processor.draw_prompt(messages[:-1])
        ids = sequence.tokens[:-1].tolist()
        assert sequence.tokens[-1] == BEGIN
        text = messages[0].content[0].text
        assert processor.draw_prompt(text).tokens.tolist() == sequence.tokens.tolist()
    elif "answered" in name:
        ids = processor.sequence(Sample(messages)).tokens.tolist()
    else:
        ids = processor.chat_prompt(messages).tokens.tolist()
    # what the published code encodes: the whole text, each image one placeholder
    expected = Tokenizer.from_file(str(FIXTURE / "tokenizer.json")).encode(prompt["text"]).ids
    expanded = [
        id
        for token in expected
        for id in ([BEGIN, *[PLACEHOLDER] * 4, END] if token == PLACEHOLDER else [token])
    ]
    assert ids == expanded
    shown = processor.tokenizer.core.decode(
        [i for i in ids if i not in (BEGIN, END)], skip_special_tokens=False
    )
    assert (
        shown.replace("<image_placeholder>" * 4, "<image_placeholder>")
        == "<｜begin▁of▁sentence｜>" + prompt["text"]
    )


def test_arrays_equal_the_reference(make: Callable[..., Processor], image: Callable[..., Any]) -> None:
    """Their words are random ids; what is fixed is where images lie, and what guidance leans on."""
    expected = np.load(FIXTURE / "expected.npz")
    processor = make(image_tokens=576, drawing=Drawing(384, 384, 576))
    reading = processor.chat_prompt([Message("user", [ImageInput(image()), Text("\nWhat?")])])
    theirs = expected["und_input_ids"][0]
    at = int((theirs == BEGIN).argmax())
    start = int((reading.tokens == BEGIN).argmax())
    assert reading.tokens[start : start + 578].tolist() == theirs[at : at + 578].tolist()
    assert (reading.understanding_mask == (reading.tokens == PLACEHOLDER)).all()
    drawing = processor.draw_prompt("A red panda")
    assert drawing.tokens[[0, -1]].tolist() == expected["gen_prompt_ids"][[0, -1]].tolist()
    blank = unconditional(drawing, processor.pad_id).tokens
    assert blank.tolist() == [1, *[3] * (len(drawing) - 2), BEGIN]


def test_the_system_text(make: Callable[..., Processor], words: Callable[..., str]) -> None:
    question = [Message("user", [Text("Hi")])]

    def prompt(processor: Processor, messages: list[Message]) -> str:
        return words(processor, processor.chat_prompt(messages).tokens)

    end = "<|User|>: Hi\n\n<|Assistant|>:"
    bos = "<｜begin▁of▁sentence｜>"
    assert prompt(make(), question) == f"{bos}{UNDERSTANDING_SYSTEM}\n\n{end}"
    assert prompt(make(system=""), question) == bos + end
    assert prompt(make(system="Be brief."), question) == f"{bos}Be brief.\n\n{end}"
    own = [Message("system", [Text(" Be kind. ")]), *question]
    assert prompt(make(), own) == f"{bos}Be kind.\n\n{end}"


def test_empty_messages_render_their_role(make: Callable[..., Processor], words: Callable[..., str]) -> None:
    processor = make(system="")
    prompt = processor.chat_prompt(
        [Message("user", []), Message("assistant", [Text(" ")]), Message("user", [Text("b")])]
    )
    text = "<|User|>:<|Assistant|>:<|User|>: b\n\n<|Assistant|>:"
    assert words(processor, prompt.tokens) == "<｜begin▁of▁sentence｜>" + text


def test_conversations_without_a_question_are_errors(make: Callable[..., Processor]) -> None:
    user, assistant = Message("user", [Text("a")]), Message("assistant", [Text("b")])
    with pytest.raises(PromptError, match="the last message is the assistant's"):
        make().chat_prompt([user, assistant])
    with pytest.raises(PromptError, match="empty"):
        make().chat_prompt([])
    with pytest.raises(PromptError, match="role 'tool'"):
        make().chat_prompt([user, Message("tool", [Text("c")])])
    with pytest.raises(PromptError, match="role 'system'"):
        make().chat_prompt([user, Message("system", [Text("c")]), user])


def test_stop_rule_of_answers(make: Callable[..., Processor]) -> None:
    assert set(make("janus-pro").stop.ids) == {2, 7}  # EOS, the user
    assert make("janus-pro").stop.strings == ()
    assert make("janus").stop.ids == (2,)
    assert make("janus").stop.strings == ("User:",)
    plain = make("plain", "bytes")
    assert plain.stop.ids == (plain.tokenizer.special_id("eos"),)
    stream = plain.stream(["STOP", ""])
    assert "".join(map(stream.push, b"so far STOP no further")) == "so far "
    assert stream.stopped
