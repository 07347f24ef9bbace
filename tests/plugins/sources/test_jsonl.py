from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular import DataError, UnsupervisedError
from janus_modular.testing import SourceContract
from janus_plugins.sources.jsonl import Jsonl, JsonlConfig

from .conftest import shape

RNG = np.random.default_rng


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "cats").mkdir()
    for name, grey in {"a": 10, "b": 200}.items():
        Image.new("RGB", (4, 3), (grey, grey, grey)).save(tmp_path / "cats" / f"{name}.png")
    (tmp_path / "cats" / "cut.png").write_bytes((tmp_path / "cats" / "a.png").read_bytes()[:40])
    return tmp_path


def source(folder: Path, *lines: Any, **options: Any) -> Jsonl:
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    return Jsonl(JsonlConfig(path=str(path), **options))


def test_captions_in_both_directions(folder: Path) -> None:
    line = {"image": "cats/a.png", "caption": " A cat. "}
    reads = source(folder, line, questions=["What is it?"]).sample(0, RNG(0))
    assert shape(reads) == [
        ("user", [("read", 10), ("What is it?", False)]),
        ("assistant", [("A cat.", True)]),
    ]
    draws = source(folder, line, task="draw").sample(0, RNG(0))
    assert shape(draws) == [("user", [("A cat.", False)]), ("assistant", [("draw", 10, True)])]
    assert reads.template
    assert draws.template


def test_classes_go_through_templates(folder: Path) -> None:
    data = source(
        folder, {"image": "cats/b.png", "class": "{tabby}"}, task="draw", templates=["{}", "one {}!"]
    )
    shapes = {shape(data.sample(0, RNG(i)))[0][1][0] for i in range(20)}
    assert shapes == {("{tabby}", False), ("one {tabby}!", False)}
    assert shape(data.sample(0, RNG(3))) == shape(data.sample(0, RNG(3)))


def test_text(folder: Path) -> None:
    sample = source(folder, {"text": "Long ago ..."}).sample(0, RNG(0))
    assert not sample.template
    assert shape(sample) == [("assistant", [("Long ago ...", True)])]


def test_conversations_with_images_anywhere(folder: Path) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": ["This", {"image": "cats/a.png"}, {"type": "text", "text": "and"}]},
        {"role": "assistant", "content": ["Like so:", {"image": "cats/b.png"}, {"read": "cats/b.png"}]},
        {"role": "user", "content": [{"draw": "cats/b.png"}]},
    ]
    assert shape(source(folder, {"messages": messages}).sample(0, RNG(0))) == [
        ("system", [("Be kind.", False)]),
        ("user", [("This", False), ("read", 10), ("and", False)]),
        ("assistant", [("Like so:", True), ("draw", 200, True), ("read", 200)]),
        ("user", [("draw", 200, False)]),
    ]


def test_blank_lines_and_line_endings(folder: Path) -> None:
    for ending in ("", "\n", "\n \n\r\n"):
        data = source(folder, '{"text":"ü"}', "", "   ", '{"text":"2"}\r', "", '{"text":"three"}' + ending)
        assert len(data) == 3
        assert [shape(data.sample(i, RNG(0)))[0][1][0][0] for i in range(3)] == ["ü", "2", "three"]


def test_memory_of_many_lines_is_their_offsets(folder: Path) -> None:
    data = source(folder, *(f'{{"text": "{i}"}}' for i in range(200_000)))
    assert len(data) == 200_000
    assert data.records.starts.nbytes == 8 * 200_000
    assert shape(data.sample(123_456, RNG(0)))[0][1] == [("123456", True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "not JSON"),
        ("[1]", "a list; expected a JSON object"),
        ({"caption": "a cat"}, "has caption; expected messages, conversations, text, image and caption"),
        ({"image": "cats/a.png", "captoin": "a"}, "an image with no text; expected exactly one of"),
        ({}, "has nothing"),
        ({"text": "  "}, "text: found '  '"),
        ({"image": 3, "caption": "a"}, "image: found 3"),
        ({"image": "cats/none.png", "caption": "a"}, "none.png' is not there"),
        ({"image": "cats/cut.png", "caption": "a"}, "cut.png"),
        ({"messages": []}, "messages: found []"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            "role 'robot'; expected system, user",
        ),
        ({"messages": [{"role": "user"}]}, "content of user: found None"),
        ({"messages": [{"role": "user", "content": [{"video": "x"}]}]}, "found the unknown keys 'video'"),
    ],
)
def test_errors_name_file_and_line(folder: Path, line: Any, message: str) -> None:
    data = source(folder, {"text": "fine"}, "", line)
    with pytest.raises(DataError) as error:
        data.sample(1, RNG(0))
    assert str(error.value).startswith(f"{folder / 'data.jsonl'}, line 3: ")
    assert message in str(error.value)


def test_images_outside_the_folder_are_refused(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    for name in ("../cats/a.png", str(folder / "cats" / "a.png")):
        with pytest.raises(DataError, match=r"lies outside .*inside: move it there, or set outside: true"):
            source(inside, {"image": name, "caption": "a"}).sample(0, RNG(0))
        source(inside, {"image": name, "caption": "a"}, outside=True).sample(0, RNG(0))
    source(inside, {"image": "a.png", "caption": "a"}, images=str(folder / "cats")).sample(0, RNG(0))


def test_unusable_files_are_errors(folder: Path) -> None:
    with pytest.raises(DataError, match=r"'YOUR/text.jsonl' is no file: set `path`"):
        Jsonl(JsonlConfig(path="YOUR/text.jsonl"))
    with pytest.raises(DataError, match="is empty"):
        source(folder)
    with pytest.raises(DataError, match=r"folder of images .* does not exist"):
        source(folder, {"text": "a"}, images=str(folder / "dogs"))
    with pytest.raises(ValueError, match="path: missing"):
        JsonlConfig()
    with pytest.raises(ValueError, match="in every template"):
        JsonlConfig(path="a", templates=["a photo"])


class TestJsonlKeepsTheContract(SourceContract):
    @pytest.fixture(autouse=True)
    def _in_a_folder(self, folder: Path) -> None:
        self.folder = folder

    def make(self) -> tuple[Jsonl, list[int]]:
        images = [{"image": f"cats/{name}.png", "caption": f"cat {name}"} for name in "ab"]
        return source(self.folder, *images, task="draw", templates=["{}", "a photo of {}"]), [0, 1]


@pytest.mark.parametrize(
    ("question", "answer", "is_unsupervised"),
    [
        ("Q", {"content": ""}, True),
        ("Q", {"content": " \n"}, True),
        ("", {"content": "A"}, False),  # half of a record
        ("Q", {"content": "", "train": False}, False),
    ],
)
def test_an_empty_answer_is_unsupervised(
    folder: Path, question: str, answer: dict[str, Any], is_unsupervised: bool
) -> None:
    """`bad_samples.unsupervised` applies to it; to other records that cannot be used, `unreadable`."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", **answer}]
    with pytest.raises(DataError, match=r"line 1: .* is empty; expected text or an image") as error:
        source(folder, {"messages": messages}).sample(0, RNG(0))
    assert isinstance(error.value, UnsupervisedError) is is_unsupervised
