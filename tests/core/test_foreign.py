"""Images after random edits, and errors of foreign libraries: the messages name the input."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import BundleError, CheckpointError, ConfigError, ImageError, JanusError
from janus_modular.foreign import (
    MAX_DEPTH,
    depth_exceeds,
    foreign_errors,
    name_in_errors,
    path_exists,
    printable,
    read_json,
)
from janus_modular.processing.image_io import open_image

# Images


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(buffer, form)
    return buffer.getvalue()


IMAGES = {form: encoded(form) for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA")}


@pytest.mark.parametrize("form", IMAGES)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of damage before it raises
@given(data=st.data())
def test_an_edited_image_is_read_or_refused_by_name(
    form: str, tmp_path_factory: pytest.TempPathFactory, mutations: ModuleType, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"edited.{form.lower()}"
    path.write_bytes(data.draw(mutations.damaged_bytes(IMAGES[form])))
    image = mutations.read_or_refused(lambda: open_image(path, max_pixels=10**6), ImageError, path.name)
    assert image is None or image.mode == "RGB"


def test_refuses_sides_that_no_filter_should_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus_modular.processing.image_io.MAX_SIDE", 100)
    assert open_image(Image.new("RGB", (1, 100))).size == (1, 100)
    for size in ((1, 101), (101, 1)):
        with pytest.raises(ImageError, match="at most 100 are read on a side"):
            open_image(Image.new("RGB", size))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x" * 300 + ".png"])
def test_refuses_names_that_no_image_has(name: str) -> None:
    with pytest.raises(ImageError):
        open_image(name)


def test_an_assertion_of_a_decoder_is_an_image_error(tmp_path: Path) -> None:
    """Of a layered Photoshop file whose resources begin with no signature."""
    path = tmp_path / "layers.psd"
    head = b"8BPS\0\1" + b"\0" * 6 + b"\0\3" + b"\0\0\0\12" * 2 + b"\0\10\0\3" + b"\0" * 4
    path.write_bytes(head + b"\0\0\0\7" + b"8BIX" + b"\0" * 20)
    with pytest.raises(ImageError, match=r"layers\.psd"):
        open_image(path)


# The boundary itself


def test_own_errors_pass_a_boundary_and_others_are_converted() -> None:
    with pytest.raises(ImageError, match=r"^mine$"), foreign_errors("file", ConfigError):
        raise ImageError("mine")
    for error in (KeyError("a"), RecursionError(), MemoryError(), AssertionError(), OverflowError("x")):
        said = r"^file cannot be read: .+\. Fetch it again\.$"
        with pytest.raises(ConfigError, match=said), foreign_errors("file", ConfigError):
            raise error
    with pytest.raises(KeyboardInterrupt), foreign_errors("file", ConfigError):
        raise KeyboardInterrupt


def test_a_panic_in_rust_is_converted() -> None:
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    said = "cannot be read: PanicException: out of range"
    with pytest.raises(ConfigError, match=said), foreign_errors("file", ConfigError):
        raise panic("out of range")


def test_an_error_gets_the_files_name_once() -> None:
    with (
        pytest.raises(ConfigError, match=r"^a\.yaml: wrong$") as caught,
        name_in_errors("a.yaml"),
        name_in_errors("a.yaml"),
    ):
        raise ConfigError("wrong", ["fault"])
    assert caught.value.errors == ["fault"]


def test_depth_is_counted_without_recursion(tmp_path: Path) -> None:
    value: Any = {}
    for _ in range(MAX_DEPTH):
        value = {"a": value}
    assert not depth_exceeds(value)
    assert depth_exceeds([value, value])
    (tmp_path / "deep.json").write_text(json.dumps({"a": value}))
    with pytest.raises(ConfigError, match=r"deep\.json is nested too deeply"):
        read_json(tmp_path / "deep.json", ConfigError)


def test_what_is_printed_fits_any_terminal() -> None:
    assert printable("a\0b\ud800\x1b[31mé") == "a\\x00b\\ud800\\x1b[31mé"
    assert len(printable("x" * 10_000)) == 400


@pytest.mark.parametrize("name", ["x" * 5000, "owner/" + "x" * 300, "a\0b", "~nobody-here/a", "\ud800"])
def test_a_name_that_no_file_can_have_is_none_that_is_there(name: str, tmp_path: Path) -> None:
    assert not path_exists(name)
    assert path_exists(tmp_path)


@pytest.mark.parametrize("character", ["\x1b[2J", "\x9b2J", "\0", "\r", "\u202e", "\ud800"])
@pytest.mark.parametrize("error", [JanusError, ConfigError, CheckpointError, BundleError])
def test_errors_hold_no_control_characters(error: type[JanusError], character: str) -> None:
    text = str(error(f"a weight 'x{character}'\nis missing"))
    assert text.isascii()
    assert text.splitlines() == [f"a weight 'x{repr(character)[1:-1]}'", "is missing"]
    assert str(error(text)) == text


def test_names_in_files_are_escaped_in_errors(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2J.yaml").write_text("nonsense: 1")
    (tmp_path / "b.yaml").write_text('"under\\estanding": 1')
    for path in tmp_path.iterdir():
        with pytest.raises(ConfigError) as caught:
            resolve(load(path), ModelConfig)
        assert "\x1b" not in str(caught.value)
