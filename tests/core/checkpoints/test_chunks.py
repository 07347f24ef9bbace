"""Weights in chunks, as several processes write them: read as whole tensors, and converted to any format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from typer.testing import CliRunner

from janus_modular import CheckpointError
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.weights.chunks import chunk_name, sharding_metadata
from janus_modular.weights.files import open_weights
from janus_modular.weights.writing import write_weights

Made = ModelAssembly
FIRST, SECOND = (chunk_name("model", rank, 2) for rank in range(2))


def write_chunks(folder: Path, tensors: dict[str, Tensor], world: int = 2) -> None:
    """Write matrices in chunks of rows, as FSDP2 shards them, and all else into the first file."""
    for rank in range(world):
        chunks, offsets = {}, {}
        for name, tensor in tensors.items():
            rows = tensor.chunk(world) if tensor.ndim > 1 else ()
            if tensor.ndim < 2 and not rank:
                chunks[name], offsets[name] = tensor, [0] * tensor.ndim
            elif rank < len(rows):
                start = sum(len(before) for before in rows[:rank])
                chunks[name], offsets[name] = rows[rank].clone(), [start] + [0] * (tensor.ndim - 1)
        save_file(chunks, folder / chunk_name("model", rank, world), sharding_metadata(offsets))


@pytest.fixture
def chunked(make: Callable[..., Made], tmp_path: Path) -> Path:
    """A checkpoint of two processes, beside the same of one process in ``whole``."""
    save(make(), tmp_path / "whole", training={"steps": 3})
    shutil.copytree(tmp_path / "whole", tmp_path / "chunked")
    (tmp_path / "chunked/model.safetensors").unlink()
    write_chunks(tmp_path / "chunked", load_file(tmp_path / "whole/model.safetensors"))
    return tmp_path / "chunked"


def test_chunks_are_read_as_whole_tensors(chunked: Path) -> None:
    whole = load_file(chunked.parent / "whole/model.safetensors")
    torch.testing.assert_close(dict(open_weights(chunked)), whole, rtol=0, atol=0)
    model = ModelAssembly.from_checkpoint(chunked).model
    expected = ModelAssembly.from_checkpoint(chunked.parent / "whole").model
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_torch_distributed_checkpoint_reads_the_same_files(chunked: Path) -> None:
    whole = load_file(chunked.parent / "whole/model.safetensors")
    tensors: dict[str, Any] = {name: torch.empty_like(tensor) for name, tensor in whole.items()}
    with pytest.warns(UserWarning, match="single process"):
        load(tensors, storage_reader=HuggingFaceStorageReader(str(chunked)), no_dist=True)
    torch.testing.assert_close(tensors, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["native", "transformers"])  # published: tests/plugins/formats
def test_chunks_are_converted_to_each_format(chunked: Path, name: str) -> None:
    """To the same files, byte for byte, as from whole tensors."""
    targets = []
    for source in (chunked, chunked.parent / "whole"):
        targets.append(chunked.parent / f"{source.name}-{name}")
        done = CliRunner().invoke(app, ["convert", str(source), str(targets[-1]), "--format", name])
        assert done.exit_code == 0, done.output
    first, second = ({path.name: path.read_bytes() for path in target.iterdir()} for target in targets)
    different = {file for file in first.keys() | second.keys() if first.get(file) != second.get(file)}
    assert different <= {"README.md", "SHA256SUMS"}  # the card names its folder
    assert any(file.endswith(".safetensors") for file in first)


@pytest.mark.parametrize("world", [1, 3, 7])
def test_sizes_that_no_number_of_processes_divides(tmp_path: Path, world: int) -> None:
    """With seven, the last process has no row of a matrix with six."""
    tensors = {"six": torch.arange(12.0).view(6, 2), "one": torch.ones(1, 2, 2), "number": torch.tensor(3.0)}
    write_chunks(tmp_path, tensors, world)
    torch.testing.assert_close(dict(open_weights(tmp_path)), tensors, rtol=0, atol=0)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def moved(folder: Path) -> None:
    with safe_open(folder / SECOND, framework="pt") as file:
        sharding = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    offsets = {name: [value + 1 for value in entry["saved_offsets"]] for name, entry in sharding.items()}
    save_file(load_file(folder / SECOND), folder / SECOND, sharding_metadata(offsets))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / SECOND).unlink(), f"lacks 1 of 2 files with chunks .*{SECOND}. Fetch them"),
        (
            lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-9]),
            f"{SECOND} cannot",
        ),
        (lambda folder: (folder / SECOND).write_bytes(b""), f"{SECOND} cannot be read"),
        (lambda folder: save_file(load_file(folder / SECOND), folder / SECOND), f"{SECOND} cannot be read"),
        (lambda folder: (folder / SECOND).rename(folder / chunk_name("model", 2, 3)), "lacks 3 of 5 files"),
        (moved, "do not fill it: expected those of a single checkpoint"),
    ],
)
def test_chunks_that_do_not_belong_together_are_errors(
    chunked: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(chunked)
    with pytest.raises(CheckpointError, match=words):
        open_weights(chunked)


def test_an_index_or_a_whole_file_beside_chunks_is_not_read(chunked: Path) -> None:
    """A checkpoint has chunks or whole tensors; a folder with both was put together by hand."""
    write_weights(chunked, [("other", torch.ones(1))])
    with pytest.raises(CheckpointError, match="both"):
        open_weights(chunked)
