"""`build` on a machine with a GPU, and for the target `tensorrt`, both with stand-ins.

A stand-in lets TensorRT-RTX do the work under the other's name: parser, builder and network are one API. What
takes a GPU (measuring, loading an engine) it plays.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx as rtx

from janus_export.bundle.bundle import load_bundle
from janus_export.errors import ExportError
from janus_export.runtimes.trt.cuda import Gpu
from janus_export.runtimes.trt.device import compute_capability
from janus_export.tensorrt_build import build as building
from janus_export.tensorrt_build import targets
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_modular.errors import MissingExtraError

FOUND = '{"Layers": [{"Name": "gemm"}]}'
MEASURED = b" and what was measured"


class Config:
    """A builder's config that measures without a GPU."""

    def __init__(self, real: Any) -> None:
        self.__dict__.update(real=real, cache=b"")
        real.num_compute_capabilities = 1
        real.set_compute_capability(rtx.ComputeCapability.SM89, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        assert name != "num_compute_capabilities", "tensorrt builds for the GPU that is here"
        setattr(self.real, name, value)

    def create_timing_cache(self, known: bytes) -> Any:
        return SimpleNamespace(serialize=lambda: known + MEASURED)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch
        self.__dict__["cache"] = cache

    def get_timing_cache(self) -> Any:
        return self.cache


class Builder:
    """TensorRT-RTX's builder, with such configs."""

    configs: list[Config] = []  # noqa: RUF012  # cleared by the fixture

    def __init__(self, logger: Any) -> None:
        self.real = rtx.Builder(logger)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def create_builder_config(self) -> Config:
        self.configs.append(Config(self.real.create_builder_config()))
        return self.configs[-1]

    def build_serialized_network_to_stream(self, network: Any, config: Config, writer: Any) -> bool:
        return self.real.build_serialized_network_to_stream(network, config.real, writer)


class Runtime:
    """Loads anything, and tells the same of it."""

    def __init__(self, logger: Any) -> None:
        pass

    def deserialize_cuda_engine(self, content: bytes) -> Any:
        assert content
        inspector = SimpleNamespace(get_engine_information=lambda form: FOUND)
        return SimpleNamespace(create_engine_inspector=lambda: inspector)


class Standin:
    """A module."""

    __version__ = "10.15.1.29"
    Builder, Runtime = Builder, Runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(rtx, name)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``standin("9.0")``: such a GPU is here, and both packages are stand-ins."""
    Builder.configs.clear()

    def install(capability: str) -> None:
        monkeypatch.setattr(targets, "import_module", lambda name: Standin())
        for module in (targets, building):
            monkeypatch.setattr(module, "compute_capability", lambda: capability)

    return install


@pytest.fixture
def bundle(tiny_gpu_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_gpu_bundle, tmp_path / "bundle")


def test_tensorrt_builds_for_the_gpu_that_is_here(bundle: Path, standin: Callable[[str], None]):
    standin("9.0")
    key, done = build(bundle, BuildConfig("tensorrt", weight_streaming=True))
    assert key == "fp16.tensorrt.sm90"
    record = load_bundle(bundle).manifest["built"][key]
    assert list(record["engines"]) == done == list(load_bundle(bundle).graphs)
    assert (record["arch"], record["builder"]) == (["9.0"], "10.15.1.29")
    assert record["options"]["weight_streaming"]
    for config in Builder.configs:
        assert config.real.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED
        assert config.real.get_flag(rtx.BuilderFlag.WEIGHT_STREAMING)
    assert [config.real.num_optimization_profiles for config in Builder.configs] == [1, 1, 2, 1, 1, 1, 1, 1]


def test_what_an_engine_is_made_of_is_kept_beside_it(bundle: Path, standin: Callable[[str], None]):
    standin("9.0")
    key, _ = build(bundle, BuildConfig("tensorrt", graphs=["embed"]))
    engine = load_bundle(bundle).manifest["built"][key]["engines"]["embed"]
    assert engine["inspector"] == f"engines/{key}/embed.json"
    assert json.loads((bundle / engine["inspector"]).read_text()) == json.loads(FOUND)


def test_engines_that_were_built_elsewhere_are_looked_into_where_their_gpu_is(
    bundle: Path, standin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    for module in (targets, building):
        monkeypatch.setattr(module, "compute_capability", lambda: None)
    config = BuildConfig("tensorrt-rtx", sm=["8.9"], graphs=["embed"])
    key, _ = build(bundle, config)
    before = load_bundle(bundle).manifest["built"][key]["engines"]["embed"]
    assert before["inspector"] is None
    standin("8.9")
    monkeypatch.setattr(Standin, "__version__", rtx.__version__)
    assert build(bundle, config) == (key, [])
    after = load_bundle(bundle).manifest["built"][key]["engines"]["embed"]
    assert after == {**before, "inspector": f"engines/{key}/embed.json"}


def test_an_engine_that_does_not_load_is_an_error(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """The driver says that there is a GPU, and TensorRT-RTX does not find it."""
    for module in (targets, building):
        monkeypatch.setattr(module, "compute_capability", lambda: "8.9")
    with pytest.raises(ExportError, match=r"embed.engine cannot be loaded on the local GPU"):
        build(bundle, BuildConfig("tensorrt-rtx", graphs=["embed"]))


def test_what_was_measured_is_read_and_written_again(
    bundle: Path, tmp_path: Path, standin: Callable[[str], None]
):
    standin("9.0")
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"known")
    build(bundle, BuildConfig("tensorrt", graphs=["embed", "sample_image"], timing_cache=cache))
    assert cache.read_bytes() == b"known" + 2 * MEASURED
    assert [path.name for path in tmp_path.glob("*cache*")] == ["timing.cache"]


def test_tensorrt_is_refused_where_its_gpu_is_not(
    bundle: Path, standin: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    standin("9.0")
    with pytest.raises(ExportError, match=r"compute capability 9.0, not for 8.9"):
        build(bundle, BuildConfig("tensorrt", sm=["8.9"]))
    monkeypatch.setattr(targets, "compute_capability", lambda: None)
    with pytest.raises(ExportError, match=r"this machine has none.*--target tensorrt-rtx needs no GPU"):
        build(bundle, BuildConfig("tensorrt"))


def test_cuda_says_which_gpu_is_here(machine: Any):
    machine.arch, machine.count = (12, 1), 2
    assert compute_capability() == compute_capability(1) == Gpu(1, extra="rtx").arch == "12.1"
    assert compute_capability(2) is None
    machine.count = 0
    assert compute_capability() is None


def test_without_the_binding_of_cuda_the_extra_of_the_target_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtraError, match=r"building for tensorrt-rtx needs the extra 'rtx'"):
        build(bundle, BuildConfig("tensorrt-rtx", graphs=["embed"]))
