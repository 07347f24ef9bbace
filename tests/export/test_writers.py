"""Exports that meet: at one bundle, and behind a link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from janus_export.bundle import BundleError, is_bundle, load_bundle
from janus_export.exporting import export
from janus_export.locking import locked
from janus_export.settings import ExportConfig


def test_a_second_export_into_a_bundle_is_refused_and_touches_nothing(tiny_checkpoint: Path, tmp_path: Path):
    aside = tmp_path / ".k.export"
    aside.mkdir()
    (aside / "work").touch()
    refused = pytest.raises(BundleError, match=rf"another export is writing .*process {os.getpid()}\)")
    with locked(aside, wait=False), refused:
        export(tiny_checkpoint, tmp_path / "k")
    assert (aside / "work").is_file()


def test_an_export_to_a_link_replaces_what_it_leads_to(tiny_checkpoint: Path, tmp_path: Path):
    (tmp_path / "k").mkdir()
    (tmp_path / "link").symlink_to("k")
    export(tiny_checkpoint, tmp_path / "link", ExportConfig(variants=["fp32"]))
    assert (tmp_path / "link").is_symlink()
    assert is_bundle(tmp_path / "k")
    assert ".lock" not in load_bundle(tmp_path / "k").manifest["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k", "link"]
