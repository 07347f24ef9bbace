"""Weight files after any edit: they are read, or refused by name; never a traceback."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from janus_modular.errors import CheckpointError
from janus_modular.weights import files
from janus_modular.weights.files import open_weights

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}


def pickled(*, archive: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": TENSORS, "step": 3}, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


FILES = {
    "model.safetensors": save(TENSORS),
    "model.pt": pickled(archive=True),
    "model.bin": pickled(archive=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize("name", FILES)
@given(data=st.data())
def test_an_edited_file_is_read_or_refused_by_name(
    name: str, folder: Path, mutations: ModuleType, data: st.DataObject
) -> None:
    path = folder / name
    path.unlink(missing_ok=True)  # a new file: older examples may be mapped still
    path.write_bytes(data.draw(mutations.damaged_bytes(FILES[name])))
    read = mutations.read_or_refused(lambda: dict(open_weights(path)), CheckpointError, name)
    for tensor in (read or {}).values():
        tensor.sum()  # every page is there


@given(data=st.data())
def test_an_edited_header_is_read_or_refused_by_name(
    folder: Path, mutations: ModuleType, data: st.DataObject
) -> None:
    whole = FILES["model.safetensors"]
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.dumps(data.draw(mutations.damaged_json(json.loads(whole[8 : 8 + length])))).encode()
    path = folder / "header.safetensors"
    path.unlink(missing_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    mutations.read_or_refused(lambda: dict(open_weights(path)), CheckpointError, path.name)


@given(data=st.data())
def test_an_edited_index_is_read_or_refused_by_name(
    folder: Path, mutations: ModuleType, data: st.DataObject
) -> None:
    (folder / "shard.safetensors").write_bytes(FILES["model.safetensors"])
    whole = {"metadata": {"total_size": 34}, "weight_map": dict.fromkeys(TENSORS, "shard.safetensors")}
    index = folder / "sharded" / "model.safetensors.index.json"
    index.parent.mkdir(exist_ok=True)
    (index.parent / "shard.safetensors").write_bytes(FILES["model.safetensors"])
    index.write_text(json.dumps(data.draw(mutations.damaged_json(whole))))
    read = mutations.read_or_refused(lambda: dict(open_weights(index.parent)), CheckpointError, "sharded")
    if read is not None:
        assert {name: tensor.tolist() for name, tensor in read.items()} == {
            name: tensor.tolist() for name, tensor in TENSORS.items()
        }


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    "header",
    ["[]", "3", "null", nested(100_000), '{"a": ' * 5000, "{", '{"a": []}', f'{{"a": "{"x" * 9000}"}}'],
)
def test_refuses_headers_of_any_form(header: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors cannot be read") as refused:
        open_weights(path)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize(
    "content", [nested(100_000), "[]", "{}", '{"weight_map": {"a": null}}', "\ud800", ""]
)
def test_refuses_an_index_of_any_form(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_weights(tmp_path)


@pytest.mark.parametrize("shard", ["x" * 5000, "a\0b.safetensors", ".", "deeper", ""])
def test_refuses_an_index_whose_files_cannot_be(shard: str, tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"])
def test_refuses_folders_where_files_belong(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.safetensors", "x" * 300 + ".pt"])
def test_refuses_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_weights(tmp_path / name)


def test_refuses_an_archive_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(CheckpointError, match=r"bomb\.pt would unpack to 10,000,000 bytes"):
        open_weights(path)


def test_refuses_mappings_that_hold_themselves(tmp_path: Path) -> None:
    endless: dict[str, Any] = {"w": torch.ones(1)}
    endless["again"] = endless
    torch.save(endless, tmp_path / "endless.pt")
    with pytest.raises(CheckpointError, match=r"endless\.pt .*nested deeper than 64 levels, or have over"):
        open_weights(tmp_path / "endless.pt")


def test_refuses_mappings_that_are_shared_at_every_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_NAMES", 5_000)
    level: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(30):  # 2^30 paths in 30 mappings
        level = {"a": level, "b": level}
    torch.save(level, tmp_path / "shared.pt")
    with pytest.raises(CheckpointError, match=r"shared\.pt .*nested deeper than 64 levels, or have over"):
        open_weights(tmp_path / "shared.pt")
