"""A failure of `verify` against another model than the bundle's is reported, and not recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from janus_export.bundle.bundle import load_bundle
from janus_export.bundle.source import describe_source, difference
from janus_export.verify import verify
from janus_modular.cli.app import app
from janus_modular.janus import Janus


@pytest.fixture
def trained(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The bundle's model after a step of training, say: the same config, other weights."""
    janus = Janus.from_pretrained(tiny_checkpoint, device="cpu")
    with torch.no_grad():
        janus.model.backbone.model.get_input_embeddings().weight.add_(0.5)
    janus.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def parity(bundle: Path) -> Any:
    return load_bundle(bundle).manifest["parity"]


def test_copies_are_the_same_model_and_trained_or_otherwise_configured_ones_are_not(
    tiny_checkpoint: Path, trained: Path, tmp_path: Path
):
    source = describe_source("original", tiny_checkpoint)
    moved = Path(shutil.copytree(tiny_checkpoint, tmp_path / "moved", copy_function=shutil.copyfile))
    (moved / "README.md").write_text("A model card of the user.", "utf-8")
    assert describe_source("moved", moved)["files"] != source["files"]  # by their times
    assert difference(source, describe_source("moved", moved)) is None
    assert difference(source, describe_source("trained", trained)) == "its weights are others, by SHA256SUMS"
    record = json.loads((moved / "config.json").read_text("utf-8"))
    (moved / "config.json").write_text(json.dumps(record | {"more": 1}), "utf-8")
    assert difference(source, describe_source("moved", moved)) == "its config.json is another"


def test_without_recorded_hashes_only_names_and_sizes_are_compared(tiny_checkpoint: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "of others"))
    (folder / "SHA256SUMS").write_text("md5 of something else", "utf-8")
    source = describe_source("", folder)
    assert "weights sha256" not in source
    assert difference(source, describe_source("original", tiny_checkpoint)) is None
    assert difference(source, describe_source("", folder)) is None
    [weights] = folder.glob("*.safetensors")
    weights.rename(folder / "more.safetensors")
    assert difference(source, describe_source("", folder)) == "its files of weights have other names or sizes"


@pytest.mark.slow
def test_a_failure_against_another_model_leaves_the_bundle_as_it_was(
    bundle: Path, tiny_checkpoint: Path, trained: Path
):
    assert verify(bundle, tiny_checkpoint, variants=["fp32"])[0].passed
    before = parity(bundle)
    run = CliRunner().invoke(app, ["verify", str(bundle), "--against", str(trained), "--variant", "fp32"])
    assert run.exit_code == 1
    assert "FAILED" in run.stdout
    message = " ".join(run.stderr.split())
    assert f"{trained} is not the model that {bundle} was exported from ({tiny_checkpoint})" in message
    assert "its weights are others, by SHA256SUMS. The failure is not recorded" in message
    assert parity(bundle) == before
    assert before["fp32"]["passed"]


@pytest.mark.slow
def test_a_failure_against_its_own_model_is_recorded(bundle: Path, tiny_checkpoint: Path):
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    manifest["model"]["sizes"]["codes"] += 1
    (bundle / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    [report] = verify(bundle, tiny_checkpoint, variants=["fp32"])
    assert not report.passed
    assert report.another_model is None
    assert not parity(bundle)["fp32"]["passed"]
