"""A bundle with a lock beside it opens with the locked plugins alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from janus_export.bundle.pruning import prune
from janus_modular import Janus, PluginError
from janus_modular.plugins import default_plugins
from janus_modular.plugins.lock import LOCK, carry_lock, compare_lock, write_lock


def test_a_bundle_is_refused_where_its_plugins_are_others(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = write_lock(bundle, default_plugins())
    Janus.from_pretrained(bundle)
    lock = json.loads(path.read_text())
    [name, *_] = lock["plugins"][0]["files"]
    lock["plugins"][0]["files"][name] = "0" * 64
    path.write_text(json.dumps(lock))
    with pytest.raises(PluginError, match=f"other bytes in {name}"):
        Janus.from_pretrained(bundle)


def test_a_bundle_that_is_pruned_or_exported_again_keeps_a_lock_that_holds(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = write_lock(bundle, default_plugins())
    text = path.read_text()
    prune(bundle, only=["text"])
    assert path.read_text() == text
    written = tmp_path / "written"
    shutil.copytree(bundle, written, ignore=lambda *_: [LOCK])
    carry_lock(bundle, written, default_plugins())
    assert (written / LOCK).read_text() == text
    lock = json.loads(text)
    lock["plugins"][0]["version"] = "0"
    path.write_text(json.dumps(lock))
    carry_lock(bundle, written, default_plugins())
    assert not (written / LOCK).exists()


def test_a_locked_bundle_runs_without_the_plugins_that_it_does_not_use(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    path = write_lock(bundle, default_plugins())
    lock = json.loads(path.read_text())
    component = {"slot": "adaptors", "name": "acme", "dist": "acme-adaptors"}
    absent = {"plugin": "acme-adaptors", "version": "1", "record_sha256": None, "files": {}}
    lock["plugins"].append(absent | {"components": [component]})
    path.write_text(json.dumps(lock))
    Janus.from_pretrained(bundle)
    report = compare_lock(bundle, default_plugins())
    assert (report.checked, report.skipped) == (["janus-modular"], ["acme-adaptors"])
    component["slot"] = "text_samplers"
    path.write_text(json.dumps(lock))
    with pytest.raises(PluginError, match="acme-adaptors 1: no text sampler is called 'acme-adaptors:acme'"):
        Janus.from_pretrained(bundle)
