"""A conversation in the terminal: its commands, interrupts, and lines that are edited and recalled."""

from __future__ import annotations

import os
import select
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular import ImageInput, Message, Text
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.cli.conversation import Conversation, converse
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_plugins.sources.jsonl import Jsonl, JsonlConfig

SETTINGS = {"max_tokens": 4}


@pytest.fixture(scope="module")
def janus() -> Janus:
    return Janus.of(assembly())


def assembly() -> ModelAssembly:
    torch.manual_seed(0)
    return ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with an image in it."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5).save("red.png")
    return tmp_path


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Type lines, and what interrupts them; then end the input."""
    rest: Iterator[str | type[BaseException]] = iter(lines)

    def read(_: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_answers_are_those_of_the_same_messages(
    janus: Janus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "Hello?", "/image red.png", "What is this?")
    conversation = Conversation(janus, "Be brief.", [], model="MODEL", **SETTINGS)
    converse(conversation)
    messages = [Message("system", [Text("Be brief.")]), Message("user", [Text("Hello?")])]
    first = janus.chat(messages, **SETTINGS)
    question = Message("user", [ImageInput(Image.open("red.png")), Text("What is this?")])
    second = janus.chat([*messages, Message("assistant", [Text(str(first))]), question], **SETTINGS)
    assert [message.content[-1] for message in conversation.messages[2::2]] == [Text(first), Text(second)]
    out = capsys.readouterr().out
    assert f"{first.lstrip()}\n{second.lstrip()}\n" in out


def test_drawings_get_new_files_and_noise_of_their_own(
    janus: Janus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("drawing-2.png").write_bytes(b"mine")
    typed(monkeypatch, "/draw a cat", "/draw a cat")
    converse(Conversation(janus, None, [], model="MODEL", **SETTINGS))
    assert Path("drawing-2.png").read_bytes() == b"mine"
    expected = janus.draw("a cat", 2)
    err = capsys.readouterr().err
    for name, image in zip(("drawing-1.png", "drawing-3.png"), expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(name)), np.asarray(image))
        assert f"drawn: {name}\n" in err
    assert Image.open("drawing-3.png").text["first"] == "1"


def test_a_drawing_holds_the_command_that_draws_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    save(assembly(), model)
    typed(monkeypatch, "/set guidance=2", "/draw a cat", '/draw a cat\'s "hat"', "/quit")
    done = CliRunner().invoke(app, ["chat", str(model), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    with Image.open("drawing-2.png") as image:
        text, drawn = image.text, np.asarray(image)
    assert (text["prompt"], text["model"], text["device"]) == ('a cat\'s "hat"', str(model), "cpu")
    words = shlex.split(text["command"])
    assert CliRunner().invoke(app, [*words[1:-1], "again.png"]).exit_code == 0
    with Image.open("again.png") as image:
        assert np.array_equal(np.asarray(image), drawn)
        assert image.text["command"] == text["command"].replace("drawing-2.png", "again.png")


def test_settings_are_changed_for_the_answers_and_drawings_that_follow(
    janus: Janus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(
        monkeypatch, "/set guidance=2", "/set max_tokens=2", "/set temperature=0.5",
        "/set guidence=2", "/set guidance=much", "/set 3", "/draw a cat", "Hello?",
    )  # fmt: skip
    conversation = Conversation(janus, None, [], model="MODEL", stop=[], **SETTINGS)
    converse(conversation)
    err = capsys.readouterr().err
    assert "set: guidance=2 for drawings\n" in err
    assert "set: max_tokens=2 for answers\n" in err
    assert "set: temperature=0.5 for answers and drawings\n" in err
    assert "/set guidence: there is no such setting. Settings of answers: max_tokens," in err
    assert "guidance: found 'much'; expected a number" in err
    assert "/set 3: expected NAME=VALUE" in err
    drawn = np.asarray(Image.open("drawing-1.png"))
    assert np.array_equal(drawn, np.asarray(janus.draw("a cat", guidance=2, temperature=0.5)[0]))
    answer = janus.chat("Hello?", max_tokens=2, temperature=0.5)
    assert conversation.messages[-1].content == [Text(answer)]


def test_a_saved_conversation_is_a_sample_for_training(janus: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "/image red.png", "What is this?", "And now?", "/save talk.jsonl", "/save talk.jsonl")
    conversation = Conversation(janus, "Be brief.", [], model="MODEL", **SETTINGS)
    converse(conversation)
    source = Jsonl(JsonlConfig(path="talk.jsonl"))
    sample = source.sample(0, np.random.default_rng(0))
    for read, message in zip(sample.messages, conversation.messages, strict=True):
        assert read.role == message.role
        assert [type(segment) for segment in read.content] == [type(segment) for segment in message.content]
        assert read.content[-1].text == message.content[-1].text
    assert [len(message.content) for message in sample.messages] == [1, 2, 1, 1, 1]


def test_errors_and_interrupts_leave_the_conversation_as_it_was(
    janus: Janus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(janus, None, [], model="MODEL", **SETTINGS)
    typed(
        monkeypatch,
        "Hello?",
        KeyboardInterrupt,
        "/image missing.png",
        "/save",
        "/nothing",
        "/save a/b/c.jsonl",
    )
    converse(conversation)
    err = capsys.readouterr().err
    for text in ("missing.png", "/save needs a file", "there is no command /nothing", "could not be written"):
        assert text in err
    before = list(conversation.messages)
    assert len(before) == 2

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    typed(monkeypatch, "/image red.png", "What?", "/draw a cat")
    with monkeypatch.context() as patch:
        patch.setattr(janus, "chat", interrupted)
        patch.setattr(janus, "draw", interrupted)
        converse(conversation)
    assert capsys.readouterr().err.count("(stopped; the conversation is as before)") == 2
    assert conversation.messages == before
    assert conversation.images == [Path("red.png")]  # still of the next message
    typed(monkeypatch, "/reset")
    converse(conversation)
    assert conversation.messages == []
    assert conversation.images == []


@pytest.mark.slow
def test_lines_are_edited_and_recalled_in_a_terminal(janus: Janus, folder: Path) -> None:
    """In a real terminal: the second process recalls the line that was typed into the first."""
    pytest.importorskip("readline")
    pty = pytest.importorskip("pty")
    janus.save_pretrained(folder / "model")
    home = folder / "home"

    def session(keys: list[bytes]) -> bytes:
        child, terminal = pty.fork()
        if not child:
            os.environ.update(HOME=str(home), TERM="xterm", XDG_STATE_HOME="")
            os.execv(
                sys.executable, [sys.executable, "-m", "janus_modular", "chat", "model", "--max-tokens", "1"]
            )
        output = b""
        for prompts, key in enumerate(keys, 1):
            while output.count(b"> ") < prompts and select.select([terminal], [], [], 120)[0]:
                output += os.read(terminal, 4096)
            os.write(terminal, key)
        while select.select([terminal], [], [], 120)[0]:
            try:
                block = os.read(terminal, 4096)
            except OSError:  # how Linux ends a terminal whose program has ended
                break
            if not block:
                break
            output += block
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, output.decode(errors="replace")
        os.close(terminal)
        return output

    session([b"Hexlo\x1b[D\x1b[D\x7fl\r", b"/quit\r"])  # two to the left, one out, one in
    saved = (home / ".local/state/janus-modular/chat_history").read_text().splitlines()
    assert saved[-2:] == ["Hello", "/quit"]
    assert b"Hello" in session([b"\x1b[A\x1b[A\r", b"/quit\r"])
