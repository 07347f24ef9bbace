"""Data sets by hub address: huggingface_hub is asked for the named files alone, and its answer is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from janus_modular import DataError
from janus_plugins.records.hub import local_path
from janus_plugins.sources.jsonl import Jsonl, JsonlConfig
from janus_plugins.sources.parquet import Parquet, ParquetConfig
from janus_plugins.sources.webdataset import WebDataset, WebDatasetConfig

COMMIT = "0" * 40


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of huggingface_hub that holds a data set, read without the network: links to blobs."""
    root = tmp_path / "datasets--acme--cats"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT / "data"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    for number in range(2):
        blob = root / "blobs" / f"b{number}"
        pq.write_table(pa.table({"text": [f"text {number}"]}), blob)
        (snapshot / f"train-{number}.parquet").symlink_to(blob)
    (root / "blobs" / "json").write_text(json.dumps({"text": "A line."}))
    (snapshot / "lines.jsonl").symlink_to(root / "blobs" / "json")
    download = huggingface_hub.snapshot_download

    def offline(*arguments: Any, **options: Any) -> str:
        return str(download(*arguments, cache_dir=tmp_path, local_files_only=True, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return snapshot


def text(source: Any, index: int = 0) -> str:
    return source.sample(index, np.random.default_rng(0)).messages[0].content[0].text


@pytest.mark.parametrize("name", ["acme/cats", "acme/cats@main", f"acme/cats@{COMMIT}"])
def test_files_of_the_hub_are_read_from_its_cache(cached: Path, name: str) -> None:
    for files in ("train-*.parquet", "train-{0..1}.parquet"):
        table = Parquet(ParquetConfig(path=f"hf://datasets/{name}/data/{files}"))
        assert [text(table, i) for i in range(len(table))] == ["text 0", "text 1"]
    assert text(Jsonl(JsonlConfig(path=f"hf://datasets/{name}/data/lines.jsonl"))) == "A line."


def test_only_the_named_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def recorded(*arguments: Any, **options: Any) -> str:
        calls.append((arguments, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    assert local_path("hf://datasets/acme/cats@refs%2Fpr%2F1/a/{0..1}.tar") == f"{tmp_path}/a/{{0..1}}.tar"
    options = {"repo_type": "dataset", "revision": "refs/pr/1", "allow_patterns": ["a/0.tar", "a/1.tar"]}
    assert calls == [(("acme/cats",), options)]
    with pytest.raises(DataError, match="files that `path` names are missing"):
        WebDataset(WebDatasetConfig(path="hf://datasets/acme/cats/0.tar"))


@pytest.mark.parametrize(
    "address", ["hf://acme/cats/a.tar", "hf://datasets/acme", "hf://datasets/acme/cats", "hf://datasets/a/b@"]
)
def test_other_addresses_are_errors(address: str) -> None:
    with pytest.raises(DataError, match=r"expected hf://datasets/OWNER/NAME/FILES"):
        local_path(address)


def test_a_data_set_that_is_not_there_is_named(cached: Path) -> None:
    with pytest.raises(DataError, match=r"'hf://datasets/acme/dogs/a.tar' cannot be fetched: \w+"):
        local_path("hf://datasets/acme/dogs/a.tar")
