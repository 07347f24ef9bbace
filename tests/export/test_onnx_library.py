"""The installed ONNX Runtime: version and build, telemetry, start of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from janus_export.bundle.bundle import ONNX_RUNTIME
from janus_export.runtimes.ort import library, providers
from janus_modular import ConfigError

USES = ["janus_export.runtimes.ort.runtime", "janus_export.verify", "janus_export.runtimes.ort.providers"]


def imported(module: str, home: Path, **environment: str) -> str:
    """Import a module in a process with a home and an environment of its own; return what it sets."""
    code = f"import os, {module}, onnxruntime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    clean = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        **environment,
    }  # without CI, which silences it too
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", USES)
def test_onnx_runtime_leaves_no_file_in_a_fresh_home(tmp_path: Path, module: str) -> None:
    assert imported(module, tmp_path) == "1"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_the_user_chose_about_telemetry_is_kept(tmp_path: Path) -> None:
    assert imported(USES[0], tmp_path, ORT_DISABLE_TELEMETRY="0") == "0"


def test_onnx_runtime_is_imported_in_one_place_alone() -> None:
    root = Path(library.__file__).parents[4]
    files = [
        path for folder in ("janus_modular", "plugins", "export") for path in (root / folder).rglob("*.py")
    ]
    importing = [
        path.relative_to(root).as_posix()
        for path in files
        if any(line.split()[:2] == ["import", "onnxruntime"] for line in path.read_text("utf-8").splitlines())
    ]
    assert importing == ["export/janus_export/runtimes/ort/library.py"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def install(version: str, *names: str) -> None:
        monkeypatch.setattr(library.onnxruntime, "__version__", version)
        monkeypatch.setattr(library, "distributions", lambda: names)

    return install


@pytest.mark.parametrize(
    ("version", "names", "found"),
    [
        ("1.24.4", ["onnxruntime 1.24.4"], "found 1.24.4 of onnxruntime. .*--upgrade 'onnxruntime>=1.25'$"),
        (
            "1.9.0",
            ["onnxruntime-gpu 1.9.0"],
            "found 1.9.0 of onnxruntime-gpu. .*--upgrade 'onnxruntime-gpu>=",
        ),
        (
            "1.24.1",
            ["onnxruntime-openvino 1.24.1"],
            "found 1.24.1 of onnxruntime-openvino.*uninstall -y onnxruntime-openvino && pip install",
        ),
        ("1.0", [], "found 1.0 of an unknown distribution"),
    ],
)
def test_a_version_that_is_too_old_is_named_with_its_distribution(
    installed: Callable[..., None], version: str, names: list[str], found: str
) -> None:
    installed(version, *names)
    with pytest.raises(ConfigError, match=f"needs onnxruntime >= 1.25, {found}"):
        library.check_installation()


@pytest.mark.parametrize(
    "version", ["1.25.0", "1.25.1", "1.31.1", "1.100.0", "2.0.0", "1.26.0.dev20260401+cpu"]
)
def test_newer_versions_are_taken(installed: Callable[..., None], version: str) -> None:
    installed(version, f"onnxruntime {version}")
    library.check_installation()
    with pytest.raises(ConfigError, match=r"needs onnxruntime >= 3\.1, found"):
        library.check_installation("3.1")


@pytest.mark.parametrize("other", ["onnxruntime-gpu", "onnxruntime-openvino", "ort-nightly"])
def test_builds_over_each_other_are_refused(installed: Callable[..., None], other: str) -> None:
    installed("1.31.1", "onnxruntime 1.31.1", f"{other} 1.30.0")
    with pytest.raises(ConfigError, match=f"pip uninstall -y onnxruntime {other} && pip install"):
        providers.choose_device("auto")


def test_the_distribution_is_found_by_what_it_installs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, top in (
        ("acme_runtime", "onnxruntime"),
        ("onnxruntime_genai", "onnxruntime_genai"),
        ("numpy", ""),
    ):
        folder = tmp_path / f"{name}-2.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.1\n")
        (folder / "top_level.txt").write_text(top)
    monkeypatch.setattr(library.onnxruntime, "__file__", str(tmp_path / "onnxruntime" / "__init__.py"))
    library.distributions.cache_clear()
    try:
        assert library.distributions() == ("acme_runtime 2.1",)
    finally:
        library.distributions.cache_clear()


def test_this_installation_is_known() -> None:
    assert [one.partition(" ")[2] for one in library.distributions()] == [library.onnxruntime.__version__]
    library.check_installation(ONNX_RUNTIME)


def test_auto_is_the_processor_where_cuda_does_not_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As onnxruntime-gpu behaves without a GPU: it has the provider, and opens graphs on the CPU instead."""
    opened: list[Any] = []

    class Session:
        def __init__(self, graph: bytes, options: Any, *, providers: list[str]) -> None:
            print("EP Error: no CUDA")
            opened.append(providers)

        def get_providers(self) -> list[str]:
            return [providers.CPU]

    present = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(providers.onnxruntime, "get_available_providers", lambda: present)
    monkeypatch.setattr(providers.onnxruntime, "InferenceSession", Session)
    assert providers.choose_device("auto") == providers.Device("cpu", 0, "cpu")
    assert opened == [present]
    [line] = caplog.messages
    assert "running on the CPU" in line
    with pytest.raises(ConfigError, match="device 'cuda': CUDAExecutionProvider did not start"):
        providers.check_provider(providers.choose_device("cuda"), Session(b"", None, providers=[]))


def test_the_probe_is_a_graph_that_starts() -> None:
    assert providers.starts("cpu")


def test_a_requirement_below_the_floor_leaves_the_floor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library.onnxruntime, "__version__", "1.20.0")
    with pytest.raises(ConfigError, match=f"needs onnxruntime >= {ONNX_RUNTIME}"):
        library.check_installation("1.19")
