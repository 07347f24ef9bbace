"""From bundle to engines, really built by TensorRT-RTX, which needs no GPU for that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from janus_export.bundle.bundle import load_bundle, write_manifest
from janus_export.bundle.engines import find_engines
from janus_export.errors import BundleError, ExportError
from janus_export.gates.engines import engines as gate
from janus_export.tensorrt_build import build as building
from janus_export.tensorrt_build import targets
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_modular.cli.app import app
from janus_modular.errors import MissingExtraError

RTX = "tensorrt-rtx"
GRAPHS = [
    *("understand", "embed", "backbone", "sample_text"),
    *("sample_image", "embed_codes", "decode_image", "tokenize_image"),
]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has, tests are written for one without a GPU."""
    for module in (targets, building):
        monkeypatch.setattr(module, "compute_capability", lambda: None)


@pytest.fixture
def bundle(tiny_gpu_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to build in."""
    return shutil.copytree(tiny_gpu_bundle, tmp_path / "bundle")


@pytest.fixture(scope="module")
def fp16_built(tiny_gpu_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of fp16; read only."""
    folder = shutil.copytree(tiny_gpu_bundle, tmp_path_factory.mktemp("built") / "bundle")
    build(folder, BuildConfig(RTX, "fp16", ["8.9"], capacity=96))
    return folder


@pytest.fixture
def built(fp16_built: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(fp16_built, tmp_path / "built")


def small(**changes: Any) -> BuildConfig:
    """Ask for engines that build in no time."""
    return BuildConfig(**{"target": RTX, "sm": ["8.9"], "graphs": ["embed", "sample_image"], **changes})


def test_every_graph_becomes_an_engine_that_the_manifest_records(fp16_built: Path):
    bundle = load_bundle(fp16_built)
    [key] = bundle.manifest["built"]
    assert key == "fp16.tensorrt-rtx.sm89"
    record = bundle.manifest["built"][key]
    assert (record["variant"], record["target"], record["arch"]) == ("fp16", RTX, ["8.9"])
    assert record["capacity"] == 96
    assert not record["executed"]
    assert list(record["engines"]) == GRAPHS
    for graph, engine in record["engines"].items():
        assert (fp16_built / engine["file"]).stat().st_size == engine["bytes"] > 10_000
        assert engine["file"] == f"engines/{key}/{graph}.engine"
        assert engine["inspector"] is None  # it takes a GPU to look into an engine
        assert engine["seconds"] > 0
    left = {path.name for path in (fp16_built / "engines" / key).iterdir()}
    assert left == {f"{graph}.engine" for graph in GRAPHS}
    schema = json.loads(files("janus_export").joinpath("bundle.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(bundle.manifest)


def test_so_do_those_of_rounded_weights(bundle: Path):
    """They come through DequantizeLinear, in blocks."""
    key, done = build(bundle, BuildConfig(RTX, "trt-int4", ["8.9"]))
    assert done == GRAPHS
    assert key == "trt-int4.tensorrt-rtx.sm89"


def test_so_do_those_of_float32(tiny_bundle: Path, tmp_path: Path):
    """Its attention has no kernel of its own; variants for CPUs beside it are left alone."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    key, done = build(folder, BuildConfig(RTX, None, ["8.9"]))
    assert done == GRAPHS
    assert key == "fp32.tensorrt-rtx.sm89"


def test_engines_are_found_by_who_runs_them(built: Path):
    bundle = load_bundle(built)
    found = find_engines(bundle, "fp16", RTX, "8.9")
    assert (found.variant, found.target, found.arch, found.capacity) == ("fp16", RTX, ["8.9"], 96)
    assert [profile.name for profile in found.engines["backbone"].profiles] == ["prefill", "decode"]
    prefill, decode = found.engines["backbone"].profiles
    assert prefill.axes == {"rows": (1, 2, 8), "tokens": (1, 16, 96), "capacity": (96, 96, 96)}
    assert decode.axes == {**prefill.axes, "tokens": (1, 1, 1)}
    assert prefill.holds({"rows": 8, "tokens": 96})
    assert not decode.holds({"rows": 8, "tokens": 2})
    [only] = found.engines["sample_image"].profiles
    assert only.axes == {"rows": (1, 2, 8), "images": (1, 1, 8)}  # without guidance a row is an image
    assert found.path("decode_image").is_file()
    with pytest.raises(BundleError, match="no tensorrt engines of fp16"):
        find_engines(bundle, "fp16", "tensorrt")
    with pytest.raises(BundleError, match=r"compute capability 12.0.*Built: fp16.tensorrt-rtx.sm89"):
        find_engines(bundle, "fp16", RTX, "12.0")


def test_an_engine_that_is_not_what_was_built_is_refused(built: Path):
    found = find_engines(load_bundle(built), "fp16", RTX)
    found.path("embed").write_bytes(b"something else")
    with pytest.raises(BundleError, match=rf"has changed.*\n.*build {built} --target {RTX} --precision fp16"):
        found.path("embed")
    (found.folder / found.engines["decode_image"].file).unlink()
    with pytest.raises(BundleError, match=r"lacks engines/.*decode_image.engine"):
        found.path("decode_image")
    with pytest.raises(BundleError, match="no engine of 'dream'"):
        found.path("dream")


def test_an_engine_outside_of_the_bundle_is_refused(built: Path):
    manifest = load_bundle(built).manifest
    manifest["built"]["fp16.tensorrt-rtx.sm89"]["engines"]["decode_image"]["file"] = "../decode_image.engine"
    write_manifest(built, manifest)
    with pytest.raises(BundleError, match="not inside"):
        find_engines(load_bundle(built), "fp16", RTX).path("decode_image")


def test_only_what_has_changed_is_built_again(built: Path):
    config = BuildConfig(RTX, "fp16", ["8.9"], capacity=96)
    folder = built / "engines" / "fp16.tensorrt-rtx.sm89"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    before = load_bundle(built).manifest["built"]
    assert build(built, config)[1] == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert load_bundle(built).manifest["built"] == before
    (folder / "embed.engine").write_bytes(b"damaged")
    assert build(built, config)[1] == ["embed"]
    wider = BuildConfig(RTX, "fp16", ["8.9"], capacity=128)
    following = ["embed", "backbone", "embed_codes"]  # the others have no axes that follow the capacity
    assert build(built, wider)[1] == following
    assert load_bundle(built).manifest["built"]["fp16.tensorrt-rtx.sm89"]["capacity"] == 128
    assert build(built, small(force=True, capacity=128))[1] == ["embed", "sample_image"]


def test_engines_that_no_longer_fit_are_removed(built: Path):
    """Asked for one graph at another capacity, engines whose axes follow it must not stay for the old one."""
    build(built, small(graphs=["embed"], capacity=128))
    record = load_bundle(built).manifest["built"]["fp16.tensorrt-rtx.sm89"]
    assert list(record["engines"]) == [graph for graph in GRAPHS if graph not in ("backbone", "embed_codes")]
    assert not (built / "engines" / "fp16.tensorrt-rtx.sm89" / "backbone.engine").exists()


def test_one_engine_serves_several_gpus(bundle: Path):
    key, _ = build(bundle, small(sm=["12.0", "8.9"], graphs=["embed"]))
    assert key == "fp16.tensorrt-rtx.sm89-sm120"
    assert find_engines(load_bundle(bundle), "fp16", RTX, "12.0").arch == ["8.9", "12.0"]


def test_an_interrupted_build_leaves_whole_engines_only(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    real = building.build_engine

    def stopped(trt: Any, model: Any, source: Path, file: Path, order: Any) -> Any:
        if source.name.startswith("sample_image"):
            file.write_bytes(b"half of it")
            raise KeyboardInterrupt
        return real(trt, model, source, file, order)

    monkeypatch.setattr(building, "build_engine", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, small())
    folder = bundle / "engines" / "fp16.tensorrt-rtx.sm89"
    assert [path.name for path in folder.iterdir()] == ["embed.engine"]
    assert list(load_bundle(bundle).manifest["built"]["fp16.tensorrt-rtx.sm89"]["engines"]) == ["embed"]
    (folder / "sample_image.unfinished").write_bytes(b"left by a machine that lost its power")
    monkeypatch.setattr(building, "build_engine", real)
    assert build(bundle, small())[1] == ["sample_image"]
    assert {path.name for path in folder.iterdir()} == {"embed.engine", "sample_image.engine"}


def test_weights_that_have_changed_are_not_built(bundle: Path):
    weights = bundle / load_bundle(bundle).manifest["variants"]["fp16"]["weights"][0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="has changed"):
        build(bundle, small())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": "tensorrt-rx"}, "Did you mean 'tensorrt-rtx'"),
        ({"sm": ["9.0"]}, r"does not build for compute capability 9.0.*7.5.*12.0[^$]*--target tensorrt"),
        ({"sm": []}, "this machine has no GPU; specify one: --sm 8.9"),
        ({"graphs": ["backbon"]}, "Did you mean 'backbone'"),
        ({"capacity": 4096}, "--capacity 4096: this bundle takes 2 to 512"),
        ({"rows": 9}, "--rows 9: this bundle takes 1 to 8"),
        ({"timing_cache": Path("cache")}, "this machine has none"),
    ],
)
def test_unbuildable_options_are_errors_before_the_build(bundle: Path, changes: dict[str, Any], said: str):
    with pytest.raises(ExportError, match=said):
        build(bundle, small(**changes))
    assert not (bundle / "engines").exists()


def test_a_variant_for_cpus_is_an_error_with_a_hint(tiny_bundle: Path):
    with pytest.raises(
        ExportError, match=r"MatMulNBits. In this bundle, TensorRT supports: fp32.*\n.*trt-int4"
    ):
        build(tiny_bundle, small(variant="cpu-int4"))
    with pytest.raises(ExportError, match="--precision fp16"):
        build(tiny_bundle, small(variant="cpu-int8"))
    with pytest.raises(BundleError, match="no variant 'fp8'"):
        build(tiny_bundle, small(variant="fp8"))


def test_a_missing_package_is_named_with_its_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(targets, "import_module", missing)
    for target, extra in ((RTX, "rtx"), ("tensorrt", "gpu")):
        with pytest.raises(MissingExtraError, match=rf"pip install 'janus-modular\[{extra}\]'"):
            build(bundle, small(target=target))


def test_the_build_command_prints_each_engine_and_inspect_lists_it(bundle: Path):
    asked = ["build", str(bundle), "--target", RTX, "--sm", "8.9", "--graph", "embed", "--weight-streaming"]
    run = CliRunner().invoke(app, asked)
    assert run.exit_code == 0, run.output
    assert "embed: 0.2 MB, built in" in run.stdout
    assert "kept" in CliRunner().invoke(app, [*asked, "--quiet"]).stdout
    shown = CliRunner().invoke(app, ["inspect", str(bundle)]).stdout
    assert "fp16.tensorrt-rtx.sm89: tensorrt-rtx 1." in shown
    assert "for 8.9: 1 of 8 graphs, 512 positions, 0.2 MB, built in" in shown
    assert "never executed" in shown


def test_building_needs_no_torch():
    code = "import sys, janus_export.tensorrt_build.build; print(*{'torch', 'transformers'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def verified(folder: Path, variant: str = "fp16") -> list[str]:
    """Return what the gate has against the engines of a bundle."""
    bundle = load_bundle(folder)
    record = bundle.manifest["variants"][variant]
    target: Any = SimpleNamespace(bundle=bundle, variant=variant, record=record)
    checks = list(gate(target))
    return [f"{check.name}: {check.measured}" for check in checks if not check.passed]


def test_the_gate_passes_what_was_built_and_says_nothing_where_nothing_was(built: Path):
    assert verified(built) == []
    bundle = load_bundle(built)
    target: Any = SimpleNamespace(bundle=bundle, variant="fp16", record=bundle.manifest["variants"]["fp16"])
    checks = list(gate(target))
    assert len(checks) == 1 + len(GRAPHS)
    assert all("never executed" in check.measured for check in checks[1:])
    target.variant = "trt-int4"
    assert list(gate(target)) == []


def lost(record: dict[str, Any]) -> None:
    del record["engines"]["decode_image"]


def of_another_graph(record: dict[str, Any]) -> None:
    record["engines"]["decode_image"]["source"] = "0" * 64


def too_narrow(record: dict[str, Any]) -> None:
    record["engines"]["backbone"]["profiles"][0]["axes"]["tokens"] = [1, 16, 32]


def without_decode(record: dict[str, Any]) -> None:
    del record["engines"]["backbone"]["profiles"][1]


def changed(record: dict[str, Any]) -> None:
    record["engines"]["embed"]["sha256"] = "0" * 64


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lost, "graphs without an engine: decode_image"),
        (of_another_graph, "decode_image: it was built from another graph"),
        (too_narrow, "backbone: its profiles do not cover the axes"),
        (without_decode, "backbone: its profiles do not cover the axes"),
        (changed, "embed.engine has changed"),
    ],
)
def test_the_gate_finds_what_it_is_there_to_find(built: Path, harm: Any, said: str):
    manifest = load_bundle(built).manifest
    harm(manifest["built"]["fp16.tensorrt-rtx.sm89"])
    write_manifest(built, manifest)
    [fault] = verified(built)
    assert said in fault
