from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular import DataError
from janus_modular.testing import SourceContract
from janus_plugins.sources.image_folder import ImageFolderConfig, ImagesWithCaptions

from .conftest import shape

RNG = np.random.default_rng


def put(file: Path, grey: int = 10) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (grey, grey, grey)).save(file, format="PNG")


def source(folder: Path, **options: Any) -> ImagesWithCaptions:
    return ImagesWithCaptions(ImageFolderConfig(path=str(folder), **options))


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """b/2.png, b/10.JPG and a.png, each with a caption; made in another order than that of their names."""
    folder = tmp_path / "captioned"
    for name, grey, caption in (
        ("b/2.png", 20, "two"),
        ("b/10.JPG", 100, "ten"),
        ("a.png", 10, " a\ncat \n"),
    ):
        put(folder / name, grey)
        (folder / name).with_suffix(".txt").write_text(caption, "utf-8")
    return folder


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "classes"
    for name, grey in {"n02/x/1.JPEG": 1, "n01/2.png": 2, "n01/1.png": 3}.items():
        put(folder / name, grey)
    return folder


def test_captions_beside_images_in_both_directions(captioned: Path) -> None:
    reads = source(captioned)
    assert reads.images == ["a.png", "b/10.JPG", "b/2.png"]
    assert shape(reads.sample(0, RNG(0))) == [
        ("user", [("read", 10), ("Describe this image.", False)]),
        ("assistant", [("a\ncat", True)]),
    ]
    draws = source(captioned, task="draw", templates=["Draw {}."])
    assert shape(draws.sample(1, RNG(0))) == [
        ("user", [("Draw ten.", False)]),
        ("assistant", [("draw", 100, True)]),
    ]


def test_class_folders_with_and_without_names(classes: Path, tmp_path: Path) -> None:
    plain = source(classes, captions="folders", task="draw")
    assert plain.images == ["n01/1.png", "n01/2.png", "n02/x/1.JPEG"]
    assert [shape(plain.sample(i, RNG(0)))[0][1] for i in range(3)] == [
        [("n01", False)],
        [("n01", False)],
        [("n02", False)],
    ]
    lines = tmp_path / "synsets.txt"
    lines.write_text("n01 tench, Tinca tinca\n\nn02\tgold fish\nn03 not used\n", "utf-8")
    named = source(classes, captions="folders", names=str(lines), templates=["a photo of {}"])
    assert shape(named.sample(0, RNG(0)))[1][1] == [("a photo of tench, Tinca tinca", True)]
    assert shape(named.sample(2, RNG(0)))[1][1] == [("a photo of gold fish", True)]
    mapping = tmp_path / "names.json"
    mapping.write_text(json.dumps({"n01": ["tench", "Tinca tinca"], "n02": "goldfish"}), "utf-8")
    several = source(classes, captions="folders", names=str(mapping))
    assert {shape(several.sample(0, RNG(i)))[1][1][0][0] for i in range(20)} == {"tench", "Tinca tinca"}


def test_images_are_opened_when_their_sample_is_taken(captioned: Path) -> None:
    (captioned / "a.png").write_bytes(b"not an image")
    data = source(captioned)
    assert len(data) == 3
    with pytest.raises(DataError, match=r"captioned/a\.png: .* is not an image that can be read"):
        data.sample(0, RNG(0))


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (None, r"has no caption: expected a text in a\.txt beside the image"),
        (b" \n", r"its caption a\.txt is empty"),
        (b"\xff\xfe", r"its caption a\.txt cannot be read: .* Expected text in UTF-8"),
        (b"a <image>", "caption: holds '<image>'"),
    ],
)
def test_a_bad_caption_is_an_error_of_its_sample_alone(
    captioned: Path, caption: bytes | None, message: str
) -> None:
    file = captioned / "a.txt"
    file.unlink() if caption is None else file.write_bytes(caption)
    data = source(captioned)
    with pytest.raises(DataError, match=rf"a\.png: {message}"):
        data.sample(0, RNG(0))
    data.sample(1, RNG(0))


def test_folders_that_cannot_be_used(tmp_path: Path, classes: Path) -> None:
    with pytest.raises(DataError, match="is no folder: set `path`"):
        source(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"has no images: found nothing; expected files ending in \.png"):
        source(empty)
    (empty / "a.heic").touch()
    with pytest.raises(DataError, match=r"has no images: found 1 \.heic"):
        source(empty)
    with pytest.raises(DataError, match=r"3 images and no caption: expected n01/1\.txt beside n01/1\.png"):
        source(classes)
    (classes / "metadata.jsonl").touch()
    with pytest.raises(DataError, match="for the metadata file in it, use the source jsonl"):
        source(classes)
    put(classes / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png in .*: in no class folder"):
        source(classes, captions="folders")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.txt", "n01 tench\n", "has no name for n02: expected one for each of 2 class folders"),
        ("names.txt", "n01 tench\nn02\n", "line 2: found 'n02'; expected CLASS NAME"),
        ("names.txt", "n01 a\nn01 b\n", "line 2: the class n01 is there twice"),
        ("names.json", "[1]", "holds a list; expected a JSON object"),
        ("names.json", "{", "cannot be read"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_names_of_classes_that_cannot_be_used(
    classes: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=message):
        source(classes, captions="folders", names=str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path: missing; expected a folder of images"),
        ({"path": "a", "suffix": "txt"}, "suffix: found 'txt'"),
        ({"path": "a", "suffix": ".JPG"}, r"suffix: found '\.JPG'"),
        ({"path": "a", "names": "b"}, "names: are those of class folders"),
        ({"path": "a", "templates": ["x"]}, "in every template"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolderConfig(**options)


def test_unused_files_are_named_once_and_hidden_files_are_not(
    captioned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (".DS_Store", ".cache/c.png"):
        (captioned / name).parent.mkdir(exist_ok=True)
        (captioned / name).touch()
    with caplog.at_level(logging.WARNING):
        source(captioned)
        assert not caplog.messages
        (captioned / "README.md").touch()
        (captioned / "b/3.txt").touch()
        source(captioned)
    [message] = caplog.messages
    assert message.endswith(
        "captioned': not used, as neither an image nor the caption of an image: README.md, b/3.txt"
    )


def test_links(captioned: Path, classes: Path) -> None:
    os.symlink(classes / "n01", captioned / "z", target_is_directory=True)
    (classes / "n01/1.txt").write_text("one")
    data = source(captioned)
    assert data.images[3:] == ["z/1.png", "z/2.png"]
    with pytest.raises(DataError, match="lies outside"):
        data.sample(3, RNG(0))
    assert shape(source(captioned, outside=True).sample(3, RNG(0)))[1][1] == [("one", True)]
    os.symlink(captioned, captioned / "b/up", target_is_directory=True)
    with pytest.raises(DataError, match=r"b/up' is a link to a folder above it: remove the link"):
        source(captioned)


def test_the_fingerprint_is_that_of_names_and_sizes(captioned: Path, classes: Path, tmp_path: Path) -> None:
    before = source(captioned).fingerprint()
    assert source(captioned, task="draw").fingerprint() == before
    (captioned / "b/2.txt").write_text("two, or three")
    changed = source(captioned).fingerprint()
    (captioned / "b/2.png").rename(captioned / "b/3.png")
    assert len({before, changed, source(captioned).fingerprint()}) == 3
    names = tmp_path / "names.json"
    digests = set()
    for name in ("tench", "carp"):
        names.write_text(json.dumps({"n01": name, "n02": name}))
        digests.add(source(classes, captions="folders", names=str(names)).fingerprint())
    assert len(digests) == 2


class TestImageFolderKeepsTheContract(SourceContract):
    @pytest.fixture(autouse=True)
    def _in_a_folder(self, captioned: Path) -> None:
        self.folder = captioned

    def make(self) -> tuple[ImagesWithCaptions, list[int]]:
        return source(self.folder, task="draw", templates=["{}", "a photo of {}"]), [0, 2]
