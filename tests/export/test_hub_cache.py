"""Bundles in a hub cache, by path and by id, and bundles whose files are hard links."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from janus_export.bundle.bundle import BundleError, load_bundle
from janus_modular import Janus
from janus_modular.bundles import find_bundle
from janus_modular.cli.app import app
from janus_modular.errors import CheckpointError
from janus_modular.foreign import sha256

COMMIT = "a" * 40


def upload(bundle: Path, cache: Path, repository: str) -> Path:
    """Lay a folder out as huggingface_hub's cache does; return the snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for path in (one for one in bundle.rglob("[!.]*") if one.is_file()):
        blob = folder / "blobs" / sha256(path)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def snapshot(tiny_bundle: Path, cache: Path) -> Path:
    return upload(tiny_bundle, cache, "acme/tiny")


def answer(path: Any) -> tuple[str, bytes]:
    janus = Janus.from_pretrained(path, device="cpu", runtime={"name": "onnx", "threads": 1})
    [image] = janus.draw("a", seed=1)
    return janus.chat("hello", max_tokens=4), np.asarray(image).tobytes()


def test_a_snapshot_opens_by_path_and_by_id_as_the_folder_does(snapshot: Path, tiny_bundle: Path) -> None:
    expected = answer(tiny_bundle)
    assert answer(snapshot) == expected
    assert answer("acme/tiny") == expected


def test_commands_take_a_hub_id(snapshot: Path, tmp_path: Path) -> None:
    for line in (
        ["inspect", "acme/tiny", "--hashes"],
        ["chat", "acme/tiny", "hello", "--max-tokens", "2"],
        ["draw", "acme/tiny", "a", "-n", "1", "-o", str(tmp_path / "out.png")],
    ):
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, done.output


@pytest.mark.usefixtures("one_reference")
def test_verify_takes_a_hub_id_and_notes_the_result_in_the_snapshot_alone(snapshot: Path) -> None:
    before = {path.name: path.read_bytes() for path in (snapshot.parents[1] / "blobs").iterdir()}
    line = ["verify", "acme/tiny", "--against", "the model", "--variant", "fp32"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert load_bundle(snapshot).manifest["parity"]["fp32"]["passed"]
    assert before == {path.name: path.read_bytes() for path in (snapshot.parents[1] / "blobs").iterdir()}


def test_what_a_link_leads_to_is_hashed(snapshot: Path) -> None:
    blob = (snapshot / "embed.fp32.onnx").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(BundleError, match=r"embed\.fp32\.onnx has changed"):
        load_bundle(snapshot)


@pytest.mark.parametrize("target", ["elsewhere", "models--acme--other/blobs/x", "models--acme--tiny/refs/x"])
@pytest.mark.parametrize("name", ["embed.fp32.onnx", "manifest.json"])
def test_a_link_out_of_the_snapshots_own_repository_is_refused(
    snapshot: Path, cache: Path, target: str, name: str
) -> None:
    link = snapshot / name
    other = cache / target
    other.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(link.resolve(), other)
    link.unlink()
    link.symlink_to(other)
    with pytest.raises(BundleError, match=r"is a link out of the bundle, to .*; expected a file in .*blobs"):
        load_bundle(snapshot)


def test_links_are_no_freer_in_a_folder_that_is_called_snapshots(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "snapshots" / "mine")
    moved = shutil.move(folder / "embed.fp32.onnx", tmp_path / "embed.fp32.onnx")
    (folder / "embed.fp32.onnx").symlink_to(moved)
    with pytest.raises(BundleError, match="is a link out of the bundle"):
        load_bundle(folder)


@pytest.mark.parametrize("leads_to", ["itself", "nothing"])
def test_a_damaged_snapshot_is_to_be_fetched_again(snapshot: Path, leads_to: str) -> None:
    weights = next((snapshot / "weights").iterdir())
    if leads_to == "itself":
        weights.unlink()
        weights.symlink_to(weights.name)
    else:
        weights.resolve().unlink()
    with pytest.raises(BundleError, match=r"Fetch it again with: hf download acme/tiny --force-download"):
        load_bundle(snapshot)
    done = CliRunner().invoke(app, ["inspect", str(snapshot)])
    assert isinstance(done.exception, BundleError | SystemExit)


def test_a_link_in_a_loop_is_refused_in_any_folder(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer\.json.*Export it again with: janus-modular export"):
        load_bundle(folder)


@pytest.mark.usefixtures("one_reference")
def test_a_hard_linked_bundle_passes_every_gate(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "linked"
    own = shutil.copytree(tiny_bundle, tmp_path / "own")  # no other test meets its links
    shutil.copytree(own, folder, copy_function=os.link)
    line = ["verify", str(folder), "--against", "the model", "--variant", "cpu-int4", "--gate", "checker"]
    done = CliRunner().invoke(app, [*line, "--gate", "lint"])
    assert done.exit_code == 0, done.output
    assert next(folder.glob("weights/*")).stat().st_nlink > 1


def test_what_is_no_bundle_on_the_hub_is_left_to_checkpoints(cache: Path, tiny_checkpoint: Path) -> None:
    upload(tiny_checkpoint, cache, "acme/checkpoint")
    assert find_bundle("acme/checkpoint") is None
    assert Janus.from_pretrained("acme/checkpoint").model is not None
    with pytest.raises(CheckpointError, match="'acme/nothing' is no file or folder here"):
        Janus.from_pretrained("acme/nothing")
    with pytest.raises(BundleError, match="acme/nothing"):
        load_bundle("acme/nothing")


def test_the_extra_is_named_where_the_hubs_package_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from janus_modular.cli.app import app; app(['inspect', 'acme/tiny'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "pip install 'janus-modular[hub]'" in " ".join(done.stderr.split()), done.stderr
