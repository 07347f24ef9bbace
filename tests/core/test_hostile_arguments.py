"""What is typed on the command line: names that no file has, outputs that cannot be written, odd letters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular.checkpoints.native import working_dtype
from janus_modular.cli.app import app
from janus_modular.cli.draw import image_format, save
from janus_modular.errors import CheckpointError, ImageError


def run(*words: str) -> tuple[int, str]:
    """Run a command; return its exit code and what it printed, in one line."""
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "HF_HUB_OFFLINE": "1"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-of-this-name/x", "x" * 300 + "/y", "[/b]"])
@pytest.mark.parametrize(
    "command", [["info"], ["config", "validate"], ["config", "show"], ["data", "inspect"]]
)
def test_names_that_nothing_has_are_refused(command: list[str], name: str) -> None:
    code, said = run(*command, name)
    assert code == 2
    assert len(said) < 3000


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("nowhere/x", "there is no folder"),
        ("x" * 300, "cannot be written: .*too long"),
        ("a\0b", "cannot be written|null"),
        ("folder", "is a folder"),
        ("file/x", "cannot be written"),
    ],
)
@pytest.mark.parametrize("command", ["draw", "inspect"])
def test_outputs_that_cannot_be_written_are_refused_before_any_work(
    command: str, output: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.png").mkdir()
    Path("folder.html").mkdir()
    Path("file").touch()
    words = {
        "draw": ("draw", "no-such-model", "a cat", "-o", f"{output}.png"),
        "inspect": ("data", "inspect", "train/janus_pro/stage1", "--out", f"{output}.html"),
    }[command]
    code, printed = run(*words)
    assert code == 2
    assert re.search(said, printed)


@pytest.mark.parametrize("name", ["a.blp", "a.xyz", "a", "a.psd", "a.xpm"])
def test_formats_that_cannot_be_written_are_refused(name: str) -> None:
    with pytest.raises(ImageError, match="no image format that can be written"):
        image_format(Path(name))


def test_sizes_that_a_format_does_not_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"a\.jpg could not be written"):
        save(Image.new("RGB", (70_000, 1)), tmp_path / "a.jpg", {})
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "complex64", "float64", "Tensor"])
def test_dtypes_that_no_model_computes_in_are_refused(dtype: str) -> None:
    with pytest.raises(CheckpointError, match=f"no dtype '{dtype}' .* float32, bfloat16, float16"):
        working_dtype(dtype, "cpu", {})


def test_weights_in_a_dtype_that_nothing_computes_in_need_another() -> None:
    weights = {"w": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"stored as torch\.float8_e4m3fn"):
        working_dtype("auto", "cuda", weights)
    assert working_dtype("auto", "cpu", weights) == torch.float32


@pytest.mark.skipif(os.name == "nt", reason="arguments are no bytes there")
def test_letters_that_no_terminal_shows_are_printed_escaped() -> None:
    line = [sys.executable, "-m", "janus_modular", "config", "show", b"\xff[/b]\x1b[31m"]
    done = subprocess.run(line, capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"there is no config '\\udcff[/b]\\x1b[31m'" in done.stderr
