"""Images in terminals: escape codes that are decoded again, and terminals that cannot show images."""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.cli.conversation import Conversation
from janus_modular.cli.draw import draw
from janus_modular.cli.terminal_images import (
    encode_half_blocks,
    encode_iterm2,
    encode_kitty,
    image_encoder,
)
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ImageError
from janus_modular.janus import Janus


class Terminal(TextIOWrapper):
    """A stream that says that it is a terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(BytesIO(), encoding=encoding)

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def decode(codes: str) -> tuple[list[str], bytes]:
    """Return the keys of kitty's escape codes, and the data of all chunks."""
    assert re.fullmatch(r"(\x1b_G[^;]*;[A-Za-z0-9+/=]*\x1b\\)+\n", codes)
    keys, chunks = zip(*re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b", codes), strict=True)
    assert all(len(chunk) == 4096 for chunk in chunks[:-1])
    assert 0 < len(chunks[-1]) <= 4096
    return list(keys), b64decode("".join(chunks), validate=True)


def test_kitty_gets_the_pixels_in_chunks() -> None:
    image = noise(300, 200)
    keys, png = decode(encode_kitty(image))
    assert len(keys) > 2
    assert keys == ["a=T,f=100,q=2,m=1", *["m=1"] * (len(keys) - 2), "m=0"]
    assert np.array_equal(Image.open(BytesIO(png)), image)
    keys, _ = decode(encode_kitty(Image.new("RGB", (300, 300))))
    assert keys == ["a=T,f=100,q=2,m=0"]


def test_a_small_image_is_enlarged_without_smoothing() -> None:
    image = noise(20, 32)
    _, png = decode(encode_kitty(image))
    assert np.array_equal(Image.open(BytesIO(png)), np.asarray(image).repeat(8, axis=0).repeat(8, axis=1))


def test_iterm2_gets_the_pixels_and_the_size_of_the_file() -> None:
    image = noise(300, 200)
    match = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+):([A-Za-z0-9+/=]+)\x07\n", encode_iterm2(image))
    png = b64decode(match[2], validate=True)
    assert len(png) == int(match[1])
    assert np.array_equal(Image.open(BytesIO(png)), image)


CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m\u2580")


def cells(codes: str) -> np.ndarray:
    """Return the pixels of half blocks, (height, width, 3)."""
    rows = []
    for line in codes.splitlines():
        found = CELL.findall(line)
        assert "".join(match[0] for match in CELL.finditer(line)) + "\x1b[0m" == line
        rows += [[list(map(int, cell[:3])) for cell in found], [list(map(int, cell[3:])) for cell in found]]
    return np.array(rows)


def test_half_blocks_have_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert np.array_equal(cells(encode_half_blocks(noise(6, 9))), noise(6, 9))
    assert cells(encode_half_blocks(noise(5, 9))).shape == (4, 9, 3)
    assert cells(encode_half_blocks(noise(104, 160))).shape == (26, 40, 3)  # as wide as the terminal
    assert cells(encode_half_blocks(noise(1, 160))).shape == (2, 40, 3)


@pytest.mark.parametrize(
    ("environment", "encoder"),
    [
        ({"TERM": "xterm-kitty"}, encode_kitty),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, encode_kitty),
        ({"TERM": "xterm-ghostty", "COLORTERM": "truecolor"}, encode_kitty),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, encode_iterm2),
        ({"TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, encode_iterm2),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, encode_half_blocks),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1", "COLORTERM": "24bit"}, encode_half_blocks),
        ({"TMUX": "x", "TERM_PROGRAM": "iTerm.app", "COLORTERM": "truecolor"}, encode_half_blocks),
    ],
)
def test_the_terminal_selects_the_encoding(environment: dict[str, str], encoder: object) -> None:
    assert image_encoder(Terminal(), environment) is encoder


@pytest.mark.parametrize(
    ("stream", "environment"),
    [
        (Terminal(), {"TERM": "xterm-256color"}),
        (Terminal(), {"TERM": "screen", "KITTY_WINDOW_ID": "1"}),
        (Terminal("latin-1"), {"TERM": "xterm-256color", "COLORTERM": "truecolor"}),
    ],
)
def test_a_terminal_without_images_is_an_error(stream: Terminal, environment: dict[str, str]) -> None:
    with pytest.raises(ImageError, match=rf"TERM={environment['TERM']}\) .* export COLORTERM=truecolor"):
        image_encoder(stream, environment)


def test_a_pipe_is_an_error() -> None:
    with pytest.raises(ImageError, match="no terminal but a file or a pipe"):
        image_encoder(StringIO(), {"TERM": "xterm-kitty"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["draw", "nothing", "a cat", "--show"], "no terminal but a file or a pipe"),
        (["chat", "nothing", "--show"], "no terminal but a file or a pipe"),
        (["draw", "nothing", "a cat", "--show", "--json"], "--show and --json"),
        (["chat", "nothing", "Hello?", "--show"], "--show and a question"),
    ],
)
def test_show_is_checked_before_the_model_is_opened(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, words, env={"TERM": "xterm-kitty"})
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.fixture(scope="module")
def janus() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))


def test_draw_shows_the_grid(janus: Janus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    janus.save_pretrained(tmp_path / "model")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLORTERM", "truecolor")
    for name in ("TMUX", "TERM_PROGRAM", "KITTY_WINDOW_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    draw(str(tmp_path / "model"), "a cat", n=2, output=tmp_path / "cats.png", show=True, device="cpu")
    *files, shown = terminal.text().split("\n", 3)
    assert files == [str(tmp_path / name) for name in ("cats.png", "cats-0.png", "cats-1.png")]
    grid = Image.open(tmp_path / "cats.png")
    assert np.array_equal(cells(shown), grid)
    assert "--show" not in grid.text["command"]


def test_a_conversation_shows_drawings(janus: Janus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    path = Conversation(janus, None, [], model="MODEL", encode=encode_iterm2).draw("a cat")
    assert terminal.text() == encode_iterm2(Image.open(path))
