"""Files of drawn images: errors of writing, the command in a PNG, replacement, the grid in a notebook."""

from __future__ import annotations

import shlex
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from janus_modular.answers import Drawings
from janus_modular.checkpoints import ModelAssembly
from janus_modular.cli.app import app
from janus_modular.cli.draw import save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ImageError
from janus_modular.janus import Janus


def test_a_folder_without_write_permission_is_named(tmp_path: Path):
    (tmp_path / "file").touch()  # writing below a file fails for every user, root too, and so does removing
    with pytest.raises(ImageError, match=r"file/out\.png could not be written"):
        save(Image.new("RGB", (2, 2)), tmp_path / "file" / "out.png", {})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))).save_pretrained(folder)
    return folder


def draw(*words: object) -> Result:
    return CliRunner().invoke(app, ["draw", *map(str, words)])


@pytest.mark.parametrize(
    "choice",
    [
        *([], ["--set", "numbers=[4, 2]"], ["--set", "first=3"], ["--set", "prefix=[3, 5]"]),
        ["--sampler", "parallel", "--set", "window=3"],
    ],
)
def test_a_png_holds_the_command_that_draws_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: list[str]
):
    monkeypatch.chdir(tmp_path)
    settings = ["--guidance", "2.5", "--temperature", "0.8", "--seed", "7", *choice]
    done = draw(model, 'a cat\'s "hat"', "-n", 2, *settings, "--device", "cpu", "-o", "cats.png")
    assert done.exit_code == 0, done.output
    for name in ("cats.png", "cats-0.png", "cats-1.png"):
        with Image.open(name) as image:
            words, pixels = shlex.split(image.text["command"]), np.asarray(image).astype(int)
        assert words[:2] == ["janus-modular", "draw"]
        folder = tmp_path / name.removesuffix(".png")
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert draw(*words[2:]).exit_code == 0
        with Image.open(name) as image:
            again = np.asarray(image).astype(int)
        assert np.abs(again - pixels).max() <= 1  # a batch of another size: a last digit may fall either way
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["draw", "a", "--sampler", "parrallel"], "no image sampler is called 'parrallel'"),
        (["chat", "a", "--sampler", "parallel"], "no text sampler is called 'parallel'"),
        (["chat", "a", "--sampler", "prompt-lookup", "--set", "ngram=0"], "ngram: found 0"),
    ],
)
def test_a_sampler_that_there_is_not_is_named(model: Path, command: list[str], expected: str):
    name, prompt, *options = command
    done = CliRunner().invoke(app, [name, str(model), prompt, *options])
    assert done.exit_code != 0
    assert expected in f"{done.output}{done.exception}"


def test_files_are_replaced_only_by_force(model: Path, tmp_path: Path):
    output = tmp_path / "cats.png"
    single = tmp_path / "cats-1.png"
    single.write_bytes(b"mine")
    refused = draw(model, "a", "-n", 2, "-o", output)
    assert refused.exit_code == 2
    assert "cats-1.pngwouldbereplaced" in "".join(refused.output.replace("│", "").split())  # in a box
    assert [path.name for path in tmp_path.iterdir()] == ["cats-1.png"]
    assert single.read_bytes() == b"mine"
    assert draw(model, "a", "-n", 2, "-o", output, "--force").exit_code == 0
    assert single.read_bytes().startswith(b"\x89PNG")


def test_no_drawings_show_nothing():
    none = Drawings([], [])
    assert none._repr_png_() is None
    with pytest.raises(ValueError, match="found no images"):
        none.grid()


def test_drawings_show_themselves_as_a_grid(model: Path):
    images = Janus.from_pretrained(model).draw("a", 3)
    width, height = images[0].size
    with Image.open(BytesIO(images._repr_png_())) as grid:
        assert grid.size == (2 * width + 4, 2 * height + 4)
        for place, image in zip([(0, 0), (width + 4, 0), (0, height + 4)], images, strict=True):
            cell = grid.crop((*place, place[0] + width, place[1] + height))
            assert np.array_equal(np.asarray(cell), np.asarray(image))
