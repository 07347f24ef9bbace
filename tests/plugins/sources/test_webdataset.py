from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular import DataError, UnsupervisedError
from janus_modular.testing import SourceContract
from janus_plugins.records.shards import Shards
from janus_plugins.sources.webdataset import WebDataset, WebDatasetConfig

from .conftest import shape

RNG = np.random.default_rng


def image(grey: int = 10) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: dict[str, Any], **options: Any) -> Path:
    """Write a tar of texts, bytes, and objects as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            if not isinstance(content, bytes):
                content = (content if isinstance(content, str) else json.dumps(content)).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def source(path: Path | str, **options: Any) -> WebDataset:
    return WebDataset(WebDatasetConfig(path=str(path), **options))


@pytest.fixture
def source_of(tmp_path: Path) -> Any:
    """Open a shard of given members as a source."""
    return lambda members, **options: source(write(tmp_path / "a.tar", members), **options)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 2, 1 and 3 captioned images, of grey 0 to 5."""
    grey = 0
    for number, count in enumerate((2, 1, 3)):
        members: dict[str, Any] = {}
        for key in range(count):
            members |= {f"./{key:03}.PNG": image(grey), f"./{key:03}.txt": f"grey {grey}"}
            grey += 1
        write(tmp_path / f"s/train-{number:04}.tar", members)
    return tmp_path / "s"


@pytest.mark.parametrize("pattern", ["train-{0000..0002}.tar", "train-000{0,1,2}.tar", "train-*.tar"])
def test_shards_in_any_order_of_samples(shards: Path, pattern: str) -> None:
    data = source(shards / pattern, task="draw")
    assert len(data) == 6
    for index in (5, 0, 3, 2, 1, 4):
        assert shape(data.sample(index, RNG(0))) == [
            ("user", [(f"grey {index}", False)]),
            ("assistant", [("draw", index, True)]),
        ]


@pytest.mark.parametrize(
    ("members", "options", "expected"),
    [
        ({"a.jpg": image(10), "a.cls": "3\n"}, {}, [("3", True)]),
        ({"a.png": image(10), "a.json": {"caption": "A."}}, {}, [("A.", True)]),
        ({"a.png": image(10), "a.json": {"text": "A."}}, {}, [("A.", True)]),
        ({"a.png": image(10), "a.txt": "A.", "a.json": {"url": 1}}, {"text": "txt"}, [("A.", True)]),
        ({"a.in.png": image(10), "a.long.txt": "A."}, {"text": "long.txt"}, [("A.", True)]),
        ({"a.png": image(10), "a.txt": "A.", "a.npy": b"0"}, {"ignore": ["npy"]}, [("A.", True)]),
        (
            {"a.png": image(10), "a.thumb.png": image(3), "a.txt": "A.", "a.json": {"url": 1}},
            {"ignore": ["thumb.png", "json"]},
            [("A.", True)],
        ),
        ({"d/a.b/c.png": image(10), "d/a.b/c.txt": "A."}, {}, [("A.", True)]),
        ({"a.txt": "A.", "b.png": image(3), "b.txt": "B", "a.png": image(10)}, {}, [("A.", True)]),
    ],
)
def test_forms_of_a_key(source_of: Any, members: Any, options: Any, expected: Any) -> None:
    sample = shape(source_of(members, **options).sample(0, RNG(0)))
    assert sample[0][1][0] == ("read", 10)
    assert sample[1][1] == expected


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "A"}]},
        {
            "messages": [
                {"role": "user", "content": "<image> or <image>?"},
                {"role": "assistant", "content": "A"},
            ],
            "images": ["k.a.png", "some/folder/k.b.png"],
        },
        {
            "messages": [
                {"role": "user", "content": [{"image": "a.png"}, " or ", {"read": "k.b.png"}, "?"]},
                {"role": "assistant", "content": "A"},
            ]
        },
    ],
)
def test_json_members_are_records_with_the_images_beside_them(source_of: Any, record: Any) -> None:
    data = source_of({"x/k.a.png": image(1), "x/k.b.png": image(2), "x/k.json": record})
    assert shape(data.sample(0, RNG(0))) == [
        ("user", [("read", 1), (" or ", False), ("read", 2), ("?", False)]),
        ("assistant", [("A", True)]),
    ]


def test_names_of_classes(source_of: Any, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("0 tench\n1 goldfish\n")
    members = {"a.png": image(), "a.cls": "1", "b.png": image(), "b.cls": "7"}
    data = source_of(members, names=str(tmp_path / "names.txt"))
    assert shape(data.sample(0, RNG(0)))[1][1] == [("goldfish", True)]
    with pytest.raises(DataError, match=r"a\.tar, b\.png: .*names\.txt' has no name for the class '7'"):
        data.sample(1, RNG(0))


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ({"k.txt": "A"}, {}, r"has no image: found txt; expected a member that ends in \.png"),
        ({"k.png": image()}, {}, "has no text, among the members png; expected one of txt"),
        (
            {"k.png": image(), "k.txt": "A", "k.cls": "1"},
            {},
            "has txt and cls, among the members png, txt, cls",
        ),
        ({"k.png": image(), "k.txt": "A", "k.npy": b""}, {}, "unknown members npy"),
        ({"k.png": image(), "k.txt": "A"}, {"text": "json"}, "has no json member: found png, txt"),
        ({"k.png": image(), "k.txt": b"\xff"}, {}, "its txt member cannot be read"),
        ({"k.png": image(), "k.txt": " "}, {}, "caption: found ' '"),
        ({"k.png": b"png", "k.txt": "A"}, {}, "is not an image that can be read"),
        ({"k.png": image(), "k.json": "{"}, {}, "not JSON"),
        ({"k.png": image(), "k.json": "[]"}, {}, "a list; expected a JSON object"),
        ({"k.png": image(), "k.json": '{"text": "a", "text": "b"}'}, {}, "the key 'text' is there twice"),
        ({"k.a.png": image(), "k.b.png": image(), "k.txt": "A"}, {}, "2 images for one caption"),
        (
            {"k.png": image(), "k.json": {"image": "../a.png", "text": "A"}},
            {},
            r"found '\.\./a\.png'; expected",
        ),
        ({"k.png": image(), "k.json": {"caption": "A", "url": 1}}, {}, "unknown keys 'url'"),
    ],
)
def test_unusable_keys_are_named(source_of: Any, members: Any, options: Any, message: str) -> None:
    data = source_of({"a.png": image(), "a.txt": "fine", "a.json": {"text": "fine"}} | members, **options)
    assert len(data) == 2
    with pytest.raises(DataError, match=rf"a\.tar, k\.[\w.]+: .*{message}"):
        data.sample(1, RNG(0))


def test_an_empty_answer_is_unsupervised(source_of: Any) -> None:
    record = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]}
    with pytest.raises(UnsupervisedError, match=r"a\.tar, a\.json: "):
        source_of({"a.json": record}).sample(0, RNG(0))


def test_members_without_key_and_suffix_are_reported(
    source_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    members = {"._a.png": b"", "README": "x", "__meta__.json": "{}", "a.png": image(), "a.txt": "A"}
    with caplog.at_level(logging.WARNING):
        assert len(source_of(members)) == 1
    assert "not used, as named otherwise than KEY.SUFFIX: ._a.png, README, __meta__.json" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:2048], "is cut short, or damaged, after 2,048 bytes"),
        (lambda raw: raw[:1500], "is cut short, or damaged, after 1,024 bytes"),
        (lambda raw: raw[:1540], "cannot be read as a tar archive"),
        (lambda raw: raw[:600], "cannot be read as a tar archive"),
        (lambda raw: raw[:1024] + b"x" * 512 + raw[1536:], "continues after"),
        (lambda raw: raw + raw, "continues after"),
        (lambda raw: b"", "cannot be read as a tar archive"),
        (lambda raw: b"\0" * 10240, "has no samples"),
        (lambda raw: b"no tar" * 1000, "cannot be read as a tar archive"),
    ],
)
def test_damaged_shards_are_errors_when_opened(shards: Path, damage: Any, message: str) -> None:
    path = shards / "train-0001.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"train-0001\.tar' {message}"):
        source(shards / "train-*.tar")


def test_a_member_that_is_there_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"a.png": image(), "a.PNG": image()})
    with pytest.raises(DataError, match=r"has a\.PNG twice, capitals aside"):
        source(path)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz"):
        pass
    with pytest.raises(
        DataError, match=r"members of a compressed one cannot be read at random\. Decompress it"
    ):
        source(tmp_path / "a.tar.gz")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "train-{0000..0004}.tar",
            r"files that `path` names are missing: .*train-0003\.tar, .*train-0004\.tar",
        ),
        ("none-*.tar", r"are missing: .*/none-\*\.tar\. Expected all"),
        ("train-{0001,000?}.tar", "names a file twice"),
        ("train-{2..1}.tar", r"has the range \{2\.\.1\}; expected the lower number first"),
        ("train-{0001}.tar", r"has \{0001\}; expected a range"),
        ("{0..99999}{0..99999}.tar", "stands for more than 1,000,000 files"),
    ],
)
def test_paths_that_name_no_files(shards: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        source(shards / pattern)


def test_long_names_and_shards_shortened_later(tmp_path: Path) -> None:
    key = "folder/" * 30 + "a"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = write(tmp_path / "a.tar", {f"{key}.png": image(10), f"{key}.txt": "A"}, format=form)
        data = source(path)
        assert shape(data.sample(0, RNG(0)))[1][1] == [("A", True)]
    path.write_bytes(path.read_bytes()[:2048])
    with pytest.raises(DataError, match="was cut short after it was indexed"):
        data.sample(0, RNG(0))


def test_the_index_file_is_used_until_a_shard_changes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run/index"
    before = [*shards.iterdir()]
    first = source(shards / "train-*.tar", index=str(file))
    assert {*shards.iterdir()} == {*before}
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_: pytest.fail("the shards were scanned again"))
        again = source(shards / "train-*.tar", index=str(file))
    for index in range(6):
        assert shape(again.sample(index, RNG(0))) == shape(first.sample(index, RNG(0)))
    write(shards / "train-0001.tar", {"x.png": image(77), "x.txt": "new", "y.png": image(), "y.txt": "y"})
    changed = source(shards / "train-*.tar", index=str(file))
    assert (len(changed), shape(changed.sample(2, RNG(0)))[1][1]) == (7, [("new", True)])
    assert len(Shards(changed.shards.paths, file)) == 7
    file.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"the index '.*run/index' cannot be read: .* remove it"):
        source(shards / "train-*.tar", index=str(file))
    with pytest.raises(DataError, match="cannot be written"):
        source(shards / "train-*.tar", index=str(file / "below"))


def test_the_fingerprint_follows_names_and_sizes_of_shards(shards: Path, tmp_path: Path) -> None:
    fingerprint = source(shards / "*.tar").fingerprint()
    shards.rename(tmp_path / "moved")
    assert source(tmp_path / "moved/*.tar").fingerprint() == fingerprint
    (tmp_path / "moved/train-0000.tar").rename(tmp_path / "moved/train-0005.tar")
    assert source(tmp_path / "moved/*.tar").fingerprint() != fingerprint


def test_shards_that_the_webdataset_package_wrote(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(str(tmp_path / "w-%04d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(5):
            pixels = np.full((3, 4, 3), 20 * i, np.uint8)
            writer.write({"__key__": f"k{i}", "png": pixels, "json": {"caption": f"c{i}"}})
    data = source(tmp_path / "w-{0000..0002}.tar")
    assert len(data) == 5
    assert [shape(data.sample(i, RNG(0))) for i in (4, 0)] == [
        [("user", [("read", 20 * i), ("Describe this image.", False)]), ("assistant", [(f"c{i}", True)])]
        for i in (4, 0)
    ]


class TestWebDatasetKeepsTheContract(SourceContract):
    @pytest.fixture(autouse=True)
    def _in_a_folder(self, shards: Path) -> None:
        self.path = shards / "train-*.tar"

    def make(self) -> tuple[WebDataset, list[int]]:
        return source(self.path, task="draw", templates=["{}", "a photo of {}"]), [0, 3]
