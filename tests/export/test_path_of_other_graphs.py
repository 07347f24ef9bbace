"""A third-party generation path with other graphs than Janus': exported, verified, drawn from, built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from janus_export.bench import bytes_read
from janus_export.bundle.bundle import load_bundle
from janus_export.bundle.pruning import prune
from janus_export.tensorrt_build import build as building
from janus_export.tensorrt_build import targets
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_export.verify import verify
from janus_modular.cli.app import app
from janus_modular.janus import Janus
from janus_modular.plugins import Plugins
from janus_modular.testing import checks_of, run_check

PLUGIN = Path(__file__).with_name("flow_path.py")
GRAPHS = ["velocity", "decode_latents"]


@pytest.mark.parametrize(
    "check",
    [
        "batch_invariance",  # each image has its own randomness, alone as in a batch
        "half_precision",  # one graph declares a float32 output
        "generation_sizes",
        "generation_sampler",
        "generation_graphs",
        "drawing_graphs",
    ],
)
def test_its_contract_holds(plugins: Plugins, check: str):
    plugins.add_file(PLUGIN)
    entry = plugins.entry("generation", "flow")
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    [found] = [each for each in checks_of("generation") if each.name == check]
    result = run_check(found, lambda: (entry.factory(entry.config(), 16), pixels), slot="generation")
    assert (result.outcome, result.note) == ("passed", "")


def test_its_manifest_holds_what_it_declares(flow_bundle: Path):
    manifest = load_bundle(flow_bundle).manifest
    assert list(manifest["graphs"]) == ["understand", "embed", "backbone", "sample_text", *GRAPHS]
    assert [manifest["graphs"][name]["role"] for name in GRAPHS] == ["other", "decode"]
    assert manifest["graphs"]["velocity"]["inputs"][0]["shape"] == ["3*images", 64]
    assert set(manifest["axes"]) == {"images", "rows", "tokens", "capacity"}
    assert manifest["model"]["sizes"] == {
        "times": [0.0, 0.25, 0.5, 0.75],
        "latent_dim": 48,
        "solver": "euler",
    }
    assert manifest["modes"] == ["text", "understanding", "drawing"]


def test_its_bundle_draws_what_torch_draws(flow_checkpoint: Path, flow_bundle: Path):
    theirs = Janus.from_pretrained(flow_checkpoint).draw(["a cat", "two dogs"], 2, seed=3)
    ours = Janus.from_pretrained(flow_bundle).draw(["a cat", "two dogs"], 2, seed=3)
    for one, other in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert len({image.tobytes() for image in ours}) == 4


@pytest.mark.parametrize("layers", [False, True])
def test_its_bundle_is_verified(flow_checkpoint: Path, flow_bundle: Path, tmp_path: Path, layers: bool):
    folder = shutil.copytree(flow_bundle, tmp_path / "bundle")
    reports = verify(folder, flow_checkpoint, layers=layers)
    assert [report.failures for report in reports] == [""] * 3
    gate = "other_graphs" if layers else "graphs"
    for report in reports:
        compared = {check.name for check in report.checks[gate]}
        assert {"velocity: moved", "velocity: x", "decode_latents"} <= compared


def test_a_graph_of_it_that_computes_something_else_is_found(
    flow_checkpoint: Path, flow_bundle: Path, tmp_path: Path
):
    folder = shutil.copytree(flow_bundle, tmp_path / "bundle")
    other = Janus.from_pretrained(flow_checkpoint)
    with torch.no_grad():
        other.model.generation.head.bias += 0.1
    other.save_pretrained(tmp_path / "other")
    [report] = verify(folder, tmp_path / "other", variants=["fp32"], gates=["graphs"])
    assert [line.split(":")[0] for line in report.failures.splitlines()] == ["velocity", "velocity"]


def test_modes_are_cut_out_of_it_and_its_speed_is_measured(
    flow_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pruned = prune(flow_bundle, variants=["fp32"], only=["drawing"], target=tmp_path / "pruned")
    assert list(load_bundle(pruned).graphs) == ["embed", "backbone", *GRAPHS]
    monkeypatch.setattr(bytes_read, "MEASURED_BYTES", 1 << 22)
    line = ["--plugin", str(PLUGIN), "bench", str(pruned), "--tokens", "3", "--rounds", "1", "--threads", "1"]
    done = CliRunner().invoke(app, [*line, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["drawing"]["rows"] == 3


@pytest.mark.parametrize("variant", ["fp32", "fp16"])
def test_its_graphs_become_engines(
    flow_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
):
    """Built by TensorRT-RTX itself, which needs no GPU for that."""
    for module in (targets, building):
        monkeypatch.setattr(module, "compute_capability", lambda: None)
    folder = shutil.copytree(flow_bundle, tmp_path / "bundle")
    key, done = build(folder, BuildConfig("tensorrt-rtx", variant, ["8.9"], capacity=64, graphs=GRAPHS))
    assert done == GRAPHS
    engines = load_bundle(folder).manifest["built"][key]["engines"]
    assert engines["velocity"]["profiles"] == [{"name": "default", "axes": {"images": [1, 1, 4]}}]
