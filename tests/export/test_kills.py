"""A bundle is the old or the new one, whenever the export or the build that writes it dies."""

from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.onnx_export import export as exporting
from janus_export.onnx_export.export import export
from janus_export.onnx_export.graphs import Graph
from janus_export.tensorrt_build import build as building
from janus_export.tensorrt_build import targets
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_export.tensorrt_build.builder import BuiltEngine
from janus_modular.foreign import sha256

OLD, NEW = "old", "new"


def write_small_bundle(folder: Path, text: str) -> None:
    """Write what is taken for a bundle: enough for what replaces one."""
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    for name in ("backbone.onnx", "weights/a.safetensors", "weights/b.safetensors", "manifest.json"):
        (folder / name).write_text(text)


def texts(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_export_that_was_killed_anywhere_never_blocks_the_next_one(
    tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs are stood in for: what is tried is how one bundle takes the place of another."""
    backbone = SimpleNamespace(backbone=SimpleNamespace(context=64))
    monkeypatch.setattr(exporting, "open_lazily", lambda *_, **__: SimpleNamespace(model=backbone))
    monkeypatch.setattr(exporting, "merge_adapters", lambda opened, _: opened)
    monkeypatch.setattr(exporting, "_check_samplers", lambda *_: None)

    class Stand:
        def __init__(self, _: str, opened: Any, temporary: Path, *others: Any) -> None:
            self.temporary = temporary

        def run(self) -> None:
            write_small_bundle(self.temporary, NEW)

    monkeypatch.setattr(exporting, "_Export", Stand)
    config = ExportConfig(capacity=32)
    for number in count():
        folder = tmp_path / str(number) / "bundle"
        write_small_bundle(folder, OLD)
        was_killed = killed_at(number, lambda folder=folder: export("source", folder, config))
        if folder.exists():
            assert texts(folder) in ({OLD}, {NEW}) or (folder / ".lock").exists()
        assert export("source", folder, config) == folder
        assert texts(folder) == {NEW}
        assert [path.name for path in folder.parent.iterdir()] == ["bundle"]
        assert not list(folder.rglob(".*"))
        if not was_killed:
            break
    assert number > 15


@pytest.mark.parametrize(
    "every", [pytest.param(4, id="every fourth"), pytest.param(1, id="every", marks=pytest.mark.proof)]
)
def test_a_build_that_was_killed_anywhere_is_gone_on_with(
    tiny_gpu_bundle: Path, tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Its engines are stood in for: what is tried is how they and their records are written."""
    for module in (targets, building):
        monkeypatch.setattr(module, "compute_capability", lambda: None)

    def build_engine(trt: Any, model: Any, source: Path, file: Path, order: Any) -> BuiltEngine:
        file.write_bytes(source.name.encode())
        return BuiltEngine(sha256(file), file.stat().st_size, 0.0, None)

    monkeypatch.setattr(building, "build_engine", build_engine)
    monkeypatch.setattr(building, "lower", lambda *_, **__: None)
    config = BuildConfig("tensorrt-rtx", "fp16", ["8.9"], graphs=["embed", "sample_image"], force=True)
    folder = shutil.copytree(tiny_gpu_bundle, tmp_path / "bundle")
    key, _ = build(folder, config)
    for number in count(0, every):
        was_killed = killed_at(number, lambda: build(folder, config))
        build(folder, config)
        engines = load_bundle(folder).manifest["built"][key]["engines"]
        assert {sha256(folder / one["file"]) for one in engines.values()} == {
            one["sha256"] for one in engines.values()
        }
        assert sorted(path.name for path in (folder / "engines" / key).iterdir()) == [
            "embed.engine",
            "sample_image.engine",
        ]
        assert not list(folder.rglob(".*"))
        if not was_killed:
            break
    assert number > 15


@pytest.mark.proof
def test_a_whole_export_survives_a_kill_at_each_file_operation(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs are traced once: tracing writes no files, and takes nine tenths of an export."""
    traced: dict[str, ir.Model] = {}

    def to_onnx(graph: Graph, mode: FakeTensorMode) -> ir.Model:
        if graph.name not in traced:
            traced[graph.name] = trace(graph, mode)
        return traced[graph.name].clone()

    trace = exporting.to_onnx
    monkeypatch.setattr(exporting, "to_onnx", to_onnx)
    config = ExportConfig(variants=["fp32"])
    folder = tmp_path / "bundle"
    export(tiny_checkpoint, folder, config)
    hashes = [load_bundle(bundle).manifest["sha256"] for bundle in (tiny_bundle, folder)]
    shutil.rmtree(folder)
    for number in count():
        shutil.copytree(tiny_bundle, folder)
        was_killed = killed_at(number, lambda: export(tiny_checkpoint, folder, config))
        if folder.exists():
            assert load_bundle(folder).manifest["sha256"] in hashes
        export(tiny_checkpoint, folder, config)
        load_bundle(folder).verify_weights()
        assert load_bundle(folder).manifest["sha256"] == hashes[1]
        assert load_bundle(folder).variants == ["fp32"]
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        assert not list(folder.rglob(".*"))
        shutil.rmtree(folder)
        if not was_killed:
            break
    assert number > 100
