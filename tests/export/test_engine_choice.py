"""The selection among several sets of engines for a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_export.bundle.bundle import Bundle, BundleError
from janus_export.bundle.engines import find_engines, key_of

RTX = "tensorrt-rtx"


def built(arch: list[str], *graphs: str) -> tuple[str, dict[str, Any]]:
    engines = {one: {"file": one, "sha256": "", "source": one, "profiles": []} for one in graphs}
    record = {"variant": "fp32", "target": RTX, "arch": arch, "builder": "1", "capacity": 8}
    return key_of("fp32", RTX, arch), {**record, "executed": False, "engines": engines}


def bundle_of(folder: Path, *sets: tuple[str, dict[str, Any]]) -> Bundle:
    files = {"embed": "embed.onnx", "backbone": "backbone.onnx"}
    hashes = {file: graph for graph, file in files.items()}
    variants = {"fp32": {"files": files}}
    return Bundle(folder, {"variants": variants, "sha256": hashes, "built": dict(sets)})


def test_a_whole_set_is_taken_before_a_part_that_was_built_first(tmp_path: Path):
    bundle = bundle_of(tmp_path, built(["8.6", "8.9"], "embed"), built(["8.9"], "embed", "backbone"))
    assert find_engines(bundle, "fp32", RTX, "8.9").arch == ["8.9"]
    assert find_engines(bundle, "fp32", RTX, "8.6").arch == ["8.6", "8.9"]


def test_of_whole_sets_the_most_specific_is_taken(tmp_path: Path):
    bundle = bundle_of(
        tmp_path, built(["8.6", "8.9"], "embed", "backbone"), built(["8.9"], "embed", "backbone")
    )
    assert find_engines(bundle, "fp32", RTX, "8.9").arch == ["8.9"]


def test_the_command_that_builds_a_missing_engine_names_its_compute_capabilities(tmp_path: Path):
    bundle = bundle_of(tmp_path, built(["8.6", "8.9"], "embed"))
    with pytest.raises(BundleError, match=r"--precision fp32 --sm 8\.6 --sm 8\.9$"):
        find_engines(bundle, "fp32", RTX, "8.9").path("backbone")
