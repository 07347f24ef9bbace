from __future__ import annotations

import io
import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular import ComponentSpec, DataError, MissingExtraError, Plugins, UnsupervisedError
from janus_modular.model.build import ModelBuilder
from janus_modular.testing import SourceContract
from janus_plugins.records import tables
from janus_plugins.sources.parquet import Parquet, ParquetConfig

from .conftest import shape

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
RNG = np.random.default_rng


def image(grey: int = 10) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, rows: list[dict[str, Any]], schema: Any = None, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema), path, **options)
    return path


def source(path: Path | str, **options: Any) -> Parquet:
    return Parquet(ParquetConfig(path=str(path), **options))


@pytest.fixture
def source_of(images: Path) -> Any:
    """Open a file of given rows, beside a.png (grey 10) and b.png (200), as a source."""

    def build(*rows: dict[str, Any], schema: Any = None, **options: Any) -> Parquet:
        return source(write(images / "a.parquet", [*rows], schema), **options)

    return build


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Three files of 5, 1 and 4 captioned images of grey 0 to 9, in groups of two rows."""
    first = 0
    for number, count in enumerate((5, 1, 4)):
        rows = [
            {"image": {"bytes": image(i), "path": None}, "caption": f"grey {i}", "width": 4}
            for i in range(first, first + count)
        ]
        write(tmp_path / f"train-{number}.parquet", rows, row_group_size=2)
        first += count
    return tmp_path


def test_rows_of_several_files_in_any_order(files: Path) -> None:
    data = source(files / "train-*.parquet", task="draw")
    assert len(data) == 10
    for index in (9, 0, 5, 4, 6, 1, 8, 2, 7, 3):
        assert shape(data.sample(index, RNG(0))) == [
            ("user", [(f"grey {index}", False)]),
            ("assistant", [("draw", index, True)]),
        ]


def test_threads_read_the_same_rows(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "CACHE_BYTES", 1)
    data = source(files / "train-*.parquet")
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(lambda index: shape(data.sample(index, RNG(0))), [*range(10)] * 5))
    assert [sample[1][1] for sample in samples] == [[(f"grey {i}", True)] for i in range(10)] * 5


def test_only_the_row_group_and_the_columns_of_a_sample_are_read(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = source(files / "train-{0,1,2}.parquet")
    read: list[tuple[int, list[str]]] = []
    read_row_group = pq.ParquetFile.read_row_group

    def recorded(self: Any, group: int, columns: list[str], **options: Any) -> Any:
        read.append((group, columns))
        return read_row_group(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    data.sample(3, RNG(0))
    assert read == [(1, ["image", "caption"])]  # `width` has no effect
    data.sample(2, RNG(0))
    data.sample(4, RNG(0))
    assert [group for group, _ in read] == [1, 2]


def test_the_cache_drops_what_was_used_least_recently() -> None:
    cache, groups = tables.RowGroupCache(limit=20), [pa.table({"a": [i]}) for i in range(3)]
    keys = [(Path("a"), i) for i in range(3)]
    for key, group in zip(keys[:2], groups, strict=False):
        cache.put(key, group)
    assert cache.get(keys[0]) is groups[0]
    cache.put(keys[2], groups[2])
    assert [cache.get(key) is not None for key in keys] == [True, False, True]
    small = tables.RowGroupCache(limit=1)
    small.put(keys[0], groups[0])
    assert small.get(keys[0]) is groups[0]


@pytest.mark.parametrize(
    "value",
    [
        image(10),
        {"bytes": image(10), "path": "other.png"},
        {"bytes": None, "path": "a.png"},
        "a.png",
        [{"bytes": image(10)}],
    ],
)
def test_images_of_each_type(source_of: Any, value: Any) -> None:
    data = source_of({"jpg": value, "title": "A.", "more": 1}, columns={"image": "jpg", "caption": "title"})
    assert shape(data.sample(0, RNG(0))) == [
        ("user", [("read", 10), ("Describe this image.", False)]),
        ("assistant", [("A.", True)]),
    ]


def test_conversations_with_images_beside_and_inside(source_of: Any) -> None:
    beside = {
        "images": [image(10), image(200)],
        "messages": [
            {"role": "user", "content": "<image> or <image>?"},
            {"role": "assistant", "content": "A."},
        ],
    }
    expected = [
        ("user", [("read", 10), (" or ", False), ("read", 200), ("?", False)]),
        ("assistant", [("A.", True)]),
    ]
    assert shape(source_of(beside).sample(0, RNG(0))) == expected
    parts = [
        {"type": "image", "text": None, "image": {"bytes": image(10)}},
        {"type": "text", "text": " or ", "image": None},
        {"type": "image", "text": None, "image": {"bytes": image(200)}},
        {"type": "text", "text": "?", "image": None},
    ]
    answer = [{"type": "text", "text": "A.", "image": None}]
    inside = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    assert shape(source_of({"messages": inside, "images": None}).sample(0, RNG(0))) == expected


def test_classes_of_datasets(source_of: Any, images: Path) -> None:
    features = {"label": {"names": ["tench", "goldfish"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())], metadata=metadata)
    rows = [{"image": image(), "label": label} for label in (1, 0, -1, None)]
    data = source_of(*rows, schema=schema, columns={"image": "image", "class": "label"}, task="draw")
    assert [shape(data.sample(i, RNG(0)))[0][1] for i in (0, 1)] == [
        [("goldfish", False)],
        [("tench", False)],
    ]
    with pytest.raises(DataError, match=r"a\.parquet, row 2: class: found -1; expected a number from 0 to 1"):
        data.sample(2, RNG(0))
    with pytest.raises(DataError, match=r"row 3: an image with no text"):
        data.sample(3, RNG(0))


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"image": 3, "text": "A"}, {}, "column 'image': found int64; expected an image: binary, string"),
        (
            {"image": b"", "title": 3.0},
            {"caption": "title"},
            "'title', used as caption: found double; expected s",
        ),
        (
            {"image": b"", "label": 3},
            {"class": "label"},
            "used as class: found int64; expected string, or integers",
        ),
        ({"messages": "x"}, {}, "column 'messages': found string; expected list<struct>"),
        ({"image": {"data": b""}, "text": "A"}, {}, "found struct<data: binary>; expected an image"),
        (
            {"image": b"", "text": "A"},
            {"caption": "title"},
            "has no column 'title'; its columns: image, text",
        ),
    ],
)
def test_columns_that_do_not_fit_are_errors_when_opened(
    source_of: Any, row: dict[str, Any], columns: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=rf"a\.parquet'.*{message}"):
        source_of(row, columns=columns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"png", "text": "A"}, "is not an image that can be read"),
        ({"image": "none.png", "text": "A"}, r"none\.png' is not there"),
        ({"image": b"", "text": None}, "an image with no text"),
        ({"image": None, "text": None}, "has nothing; expected messages"),
        ({"image": image(), "text": "A", "url": "x"}, "unknown keys 'url'; .* `ignore`"),
    ],
)
def test_rows_that_cannot_be_used_are_named(source_of: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.parquet, row 1: .*{message}"):
        source_of({key: row[key] for key in row}, row).sample(1, RNG(0))


def test_ignored_columns_and_empty_answers(source_of: Any) -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]
    with pytest.raises(UnsupervisedError, match="row 0: "):
        source_of({"messages": messages, "url": "x"}, ignore=["url"]).sample(0, RNG(0))


def test_files_that_cannot_be_read(files: Path) -> None:
    with pytest.raises(DataError, match=r"files that `path` names are missing: .*train-3\.parquet"):
        source(files / "train-{0..3}.parquet")
    with pytest.raises(
        DataError, match=r"without state\.json; expected one that save_to_disk wrote, or Parquet"
    ):
        source(files)
    cut = files / "train-1.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-1\.parquet' cannot be read as Parquet"):
        source(files / "train-*.parquet")
    write(cut, [{"image": "a.png", "caption": "A"}])
    with pytest.raises(
        DataError, match=r"train-1\.parquet', column 'image': found string; expected struct<byt"
    ):
        source(files / "train-*.parquet")


def test_a_damaged_row_group_is_an_error_of_its_samples(files: Path) -> None:
    path = files / "train-0.parquet"
    raw = bytearray(path.read_bytes())
    raw[4:300] = b"\xff" * 296
    path.write_bytes(raw)
    data = source(path)
    with pytest.raises(DataError, match=r"train-0\.parquet, row 0: .*cannot be read as Parquet"):
        data.sample(0, RNG(0))
    data.sample(4, RNG(0))


def test_large_row_groups_are_named(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        source(files / "train-*.parquet")
        assert not caplog.messages
        monkeypatch.setattr(tables, "LARGE_GROUP", 10)
        source(files / "train-*.parquet")
    assert "decodes a whole group. For faster reading, write the file again" in caplog.text


def test_the_fingerprint_follows_names_and_sizes(files: Path) -> None:
    before = source(files / "train-*.parquet").fingerprint()
    assert source(files / "train-{0..2}.parquet", task="draw").fingerprint() == before
    assert source(files / "train-{0..1}.parquet").fingerprint() != before


def arrow(path: Path, rows: list[dict[str, Any]], new: Any) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("form", ["new_stream", "new_file"])
def test_folders_that_save_to_disk_wrote(tmp_path: Path, form: str) -> None:
    names = [f"data-{i:05}-of-00002.arrow" for i in range(2)]
    for number, name in enumerate(names):
        rows = [{"image": image(3 * number + i), "caption": f"c{3 * number + i}"} for i in range(3)]
        arrow(tmp_path / name, rows, getattr(pa.ipc, form))
    state = {"_data_files": [{"filename": name} for name in names]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    data = source(tmp_path)
    assert [shape(data.sample(i, RNG(0))) for i in (5, 0)] == [
        [("user", [("read", i), ("Describe this image.", False)]), ("assistant", [(f"c{i}", True)])]
        for i in (5, 0)
    ]
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:-300])
    with pytest.raises(DataError, match=rf"{names[1]}' cannot be read as Arrow"):
        source(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state\.json' cannot be read: .* Save the data again"):
        source(tmp_path)


def test_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").touch()
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").touch()
    with pytest.raises(
        DataError, match=r"the splits test, train; expected one of them: set `path` to .*/test"
    ):
        source(tmp_path)


def test_what_the_package_datasets_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    )
    content = {"image": [{"bytes": image(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    table = datasets.table.InMemoryTable(pa.table(content, schema=features.arrow_schema))
    info = datasets.DatasetInfo(features=features)
    data = datasets.Dataset(table, info=info, fingerprint="any")
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "a.parquet"))
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        rows = source(path, columns={"image": "image", "class": "label"})
        assert [shape(rows.sample(i, RNG(0))) for i in range(4)] == [
            [("user", [("read", i), ("Describe this image.", False)]), ("assistant", [(name, True)])]
            for i, name in enumerate(("even", "odd", "even", "odd"))
        ]


def test_without_pyarrow_the_extra_is_named(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = ComponentSpec("sources", "parquet", ParquetConfig(path=__file__))
    with pytest.raises(MissingExtraError, match=r"the source 'parquet' .* needs the extra 'parquet'"):
        ModelBuilder(plugins)(spec)


class TestParquetKeepsTheContract(SourceContract):
    @pytest.fixture(autouse=True)
    def _in_a_folder(self, files: Path) -> None:
        self.path = files / "train-*.parquet"

    def make(self) -> tuple[Parquet, list[int]]:
        return source(self.path, task="draw", templates=["{}", "a photo of {}"]), [0, 5]
