"""Weight files of any origin: read lazily; damaged files are errors with a reason."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from janus_modular.errors import CheckpointError
from janus_modular.weights.files import open_weights


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4),
        "b.weight": torch.randn(5, dtype=torch.bfloat16),
        "c.steps": torch.tensor(7),
    }


def same(path: Path, tensors: dict[str, Tensor]) -> bool:
    weights = open_weights(path)
    return weights.keys() == tensors.keys() and all(torch.equal(weights[k], v) for k, v in tensors.items())


def sharded(folder: Path, tensors: dict[str, Tensor], suffix: str) -> Path:
    """Write one shard a tensor, and their index."""
    name = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    where = {}
    for i, (key, tensor) in enumerate(tensors.items()):
        where[key] = f"{name}-{i + 1:05}-of-{len(tensors):05}.{suffix}"
        path = folder / where[key]
        save_file({key: tensor}, path) if suffix == "safetensors" else torch.save({key: tensor}, path)
    index = folder / f"{name}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "vq_ds16_c2i.pt", "any.safetensors", "last.ckpt"]
)
def test_reads_a_single_file_and_its_folder(name: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / name
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(OrderedDict(tensors), path)
    assert same(path, tensors)
    assert same(tmp_path, tensors)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_joins_shards(suffix: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    sharded(tmp_path, tensors, suffix)
    assert same(tmp_path, tensors)


def test_flattens_wrappers_and_leaves_out_what_is_no_tensor(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(
        {"ema": tensors, "model": tensors, "steps": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "vq.pt"
    )
    weights = open_weights(tmp_path / "vq.pt")
    assert set(weights) == {f"{kind}.{name}" for kind in ("ema", "model") for name in tensors}
    assert torch.equal(weights["ema.a.weight"], tensors["a.weight"])


def test_reads_checkpoints_of_lightning(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    state = {"epoch": 3, "global_step": 9, "state_dict": tensors, "optimizer_states": [], "callbacks": {}}
    torch.save(state, tmp_path / "last.ckpt")
    assert set(open_weights(tmp_path)) == {f"state_dict.{name}" for name in tensors}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ["encoder.jit", "model.pt"])
def test_refuses_programs_whatever_they_are_called(name: str, tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), str(tmp_path / name))
    with pytest.raises(CheckpointError, match=rf"{name} is a TorchScript program: code .* is never run"):
        open_weights(tmp_path / name)


def test_knows_what_was_never_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert "a.weight" in weights  # asking is not reading
    _ = weights["b.weight"]
    assert weights.unexpected_keys() == ["a.weight", "c.steps"]


def test_writing_into_what_was_read_leaves_the_file_alone(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt"):
        path = tmp_path / name
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        open_weights(path)["a.weight"].zero_()
        assert same(path, tensors)


def test_reads_the_old_format_with_a_notice(
    tensors: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.WARNING):
        assert same(path, tensors)
    assert "old format" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.6, 0.999])
def test_refuses_a_file_that_is_cut_short(
    name: str, kept: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    tensors = {f"w{i}": torch.randn(100) for i in range(20)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(CheckpointError, match=name):
        open_weights(tmp_path)
    assert "old format" not in caplog.text


def test_says_how_long_a_safetensors_file_should_be(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"has {size - 4} bytes, its header promises {size}"):
        open_weights(path)


class Runs:
    """Unpickled, it calls a function."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


@pytest.mark.parametrize(("hook", "named"), [(Path, "pathlib.Path"), (Runs(), "posix.system")])
@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_code_in_a_pickle(hook: object, named: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(1), "hook": hook}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"more than tensors \({named}") as error:
        open_weights(path)
    assert "weights_only" not in str(error.value)  # torch advises to switch the protection off


@pytest.fixture
def callbacks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Make a package with a class of its own, for as long as a file is being written."""

    def make(name: str) -> ModuleType:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            inner = ".".join(parts[:end])
            monkeypatch.setitem(sys.modules, inner, ModuleType(inner))
        exec("class ModelCheckpoint: pass", vars(sys.modules[name]))
        return sys.modules[name]

    return make


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning"])
@pytest.mark.parametrize("made", [False, True])  # a class, which files of 2020 hold, or an object
def test_reads_the_tensors_of_lightning_without_its_classes(
    package: str, made: bool, tensors: dict[str, Tensor], tmp_path: Path, callbacks: Any
) -> None:
    name = f"{package}.callbacks.model_checkpoint"
    kind = callbacks(name).ModelCheckpoint
    one = kind()
    one.best = "last.ckpt"
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": tensors, "callbacks": {"0": one} if made else {kind: {"best": 1.0}}}, path)
    del sys.modules[name]

    weights = open_weights(path)

    assert set(weights) == {f"state_dict.{key}" for key in tensors}
    assert torch.equal(weights["state_dict.a.weight"], tensors["a.weight"])
    assert name not in sys.modules


def test_refuses_classes_of_others_and_code_beside_lightnings(tmp_path: Path, callbacks: Any) -> None:
    path = tmp_path / "last.ckpt"
    for hook, named in (
        (callbacks("acme.callbacks").ModelCheckpoint, "acme.callbacks.ModelCheckpoint"),
        (Runs(), "posix.system"),
    ):
        kind = callbacks("lightning.callbacks").ModelCheckpoint
        torch.save({"w": torch.zeros(1), "kind": kind, "hook": hook}, path)
        with pytest.raises(CheckpointError, match=rf"more than tensors \({named}"):
            open_weights(path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_names_a_shard_that_is_missing(suffix: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    sharded(tmp_path, tensors, suffix)
    gone = next(tmp_path.glob(f"*-00002-of-*.{suffix}"))
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of 3 shards.*{gone.name}"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("held", "told", "message"),
    [("a.weight", "x.weight", "lacks x.weight.*also holds a.weight"), ("a.weight", "", "holds a.weight")],
)
def test_names_an_index_that_says_otherwise(
    held: str, told: str, message: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    index = sharded(tmp_path, tensors, "safetensors")
    content = json.loads(index.read_text())
    where = content["weight_map"].pop(held)
    if told:
        content["weight_map"][told] = where
    else:
        save_file({"b.weight": tensors["b.weight"], held: tensors[held]}, tmp_path / where)
        content["weight_map"]["b.weight"] = where
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


def test_refuses_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": {')
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_weights(tmp_path)


def test_says_what_a_folder_without_weights_lacks(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="not a weight file"):
        open_weights(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="no file"):
        open_weights(tmp_path / "gone.safetensors")


def test_does_not_choose_among_several_files(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("one.pt", "two.pt"):
        torch.save(tensors, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"one\.pt, two\.pt"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"a": "../elsewhere.safetensors"}, "files outside of its folder: ../elsewhere"),
        ({"a": "/etc/elsewhere.safetensors"}, "files outside of its folder: /etc"),
        ({"a": 5}, "not an index"),
        (["a"], "not an index"),
    ],
)
def test_refuses_an_index_that_leads_elsewhere(tmp_path: Path, where: Any, said: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save_file({"a": torch.ones(1)}, tmp_path.parent / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_weights(tmp_path)
