"""Concurrent writers of a bundle: exports and commands, also through a symbolic link."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from janus_export.bundle.bundle import BundleError, is_bundle, load_bundle, write_manifest
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_modular.atomic_writes import folder_lock


def test_a_second_export_into_a_bundle_is_refused_and_touches_nothing(tiny_checkpoint: Path, tmp_path: Path):
    temporary = tmp_path / ".k.export"
    temporary.mkdir()
    (temporary / "work").touch()
    refused = pytest.raises(BundleError, match=rf"another process is writing .*process {os.getpid()}\)")
    with folder_lock(tmp_path / "k", error=BundleError), refused:
        export(tiny_checkpoint, tmp_path / "k")
    assert (temporary / "work").is_file()


@pytest.mark.slow
def test_an_export_to_a_link_replaces_what_it_leads_to(tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "k").mkdir()
    (tmp_path / "link").symlink_to("k")
    export(tiny_checkpoint, tmp_path / "link", ExportConfig(variants=["fp32"], only=["text"]))
    assert (tmp_path / "link").is_symlink()
    assert is_bundle(tmp_path / "k")
    assert not [path for path in (tmp_path / "k").rglob("*") if "lock" in path.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "link"]


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_two_commands_on_one_bundle_keep_each_others_results(copied: Path):
    first, second = load_bundle(copied), load_bundle(copied)
    first.record("parity", "fp32", {"backbone": 1e-6})
    second.record("parity", "cpu-int4", {"backbone": 1e-2})
    assert manifest_of(copied)["parity"] == {"fp32": {"backbone": 1e-6}, "cpu-int4": {"backbone": 1e-2}}
    assert second.manifest == manifest_of(copied)


def test_a_result_of_a_bundle_that_was_replaced_is_not_noted_in_the_new_one(copied: Path):
    bundle = load_bundle(copied)
    replaced = manifest_of(copied)
    replaced["variants"].pop("cpu-int8")
    write_manifest(copied, replaced)
    with pytest.raises(BundleError, match="replaced by another export"):
        bundle.record("parity", "fp32", {"backbone": 1e-6})
    assert manifest_of(copied) == replaced
