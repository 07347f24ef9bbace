"""Bundles with only some modes: export, verification, benchmarks, and the results of a full bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from janus_export.bench.run import bench
from janus_export.bundle.bundle import load_bundle
from janus_export.bundle.pruning import prune
from janus_export.config import ExportConfig
from janus_export.verify import verify
from janus_modular.cli.app import app
from janus_modular.janus import Janus

TABLE = "backbone.model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def text_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For text alone, by the command, in float32; with what the command printed beside it."""
    folder = tmp_path_factory.mktemp("text") / "bundle"
    line = ["export", str(tiny_checkpoint), str(folder), "--only", "text", "--json", "--quiet"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    folder.with_name("printed.json").write_text(done.stdout)
    return folder


def test_export_prints_its_sizes_as_json(text_bundle: Path, tiny_checkpoint: Path):
    printed = json.loads(text_bundle.with_name("printed.json").read_text())
    [variant] = printed["variants"]
    assert variant["variant"] == "fp32"
    assert set(variant["graphs"]) == {"embed", "backbone", "sample_text"}
    assert printed["bytes"] == sum(path.stat().st_size for path in text_bundle.rglob("*") if path.is_file())
    assert printed["checkpoint_bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size


def test_a_tied_word_table_is_quantised_as_in_a_whole_bundle(
    tiny_bundle: Path, drawing_bundle: Path, tmp_path: Path
):
    pruned = prune(tiny_bundle, variants=["cpu-int4"], only=["drawing"], target=tmp_path / "pruned")
    bits = [
        load_bundle(folder).manifest["variants"]["cpu-int4"]["quantization"]["weight_bits"]
        for folder in (tiny_bundle, drawing_bundle)
    ]
    assert [one[TABLE] for one in bits] == [8, 8]
    assert set(load_bundle(drawing_bundle).manifest["variants"]["cpu-int4"]["files"]) == {
        "embed", "backbone", "sample_image", "embed_codes", "decode_image", "tokenize_image",
    }  # fmt: skip
    images = [
        Janus.from_pretrained(folder, variant="cpu-int4").draw("a cat", n=2, seed=3)
        for folder in (tiny_bundle, drawing_bundle, pruned)
    ]
    assert {one.tobytes() for one in images[0]} == {one.tobytes() for one in images[1]}
    assert {one.tobytes() for one in images[0]} == {one.tobytes() for one in images[2]}


@pytest.mark.parametrize(
    ("graphs", "beside"),
    [(None, ("sample_text",)), (["backbone"], ()), (["embed", "backbone"], ())],
)
def test_the_head_is_lowered_beside_where_it_would_be_quantised(
    graphs: list[str] | None, beside: tuple[str, ...]
):
    config = ExportConfig(variants=["fp32", "cpu-int4"], only=["drawing"])
    config.quantize.graphs = graphs
    assert config.lowered_beside == beside
    assert ExportConfig(variants=["cpu-int4"], only=["text"]).lowered_beside == ()
    assert ExportConfig(variants=["fp32", "trt-int4"], only=["drawing"]).lowered_beside == ()


def test_a_bundle_without_drawing_is_verified_and_measured(text_bundle: Path, tiny_checkpoint: Path):
    [report] = verify(text_bundle, tiny_checkpoint)
    assert report.passed, report.failures
    assert "drawing" in report.nothing_to_check
    assert {"checker", "lint", "sizes", "graphs", "rows", "cache", "answer"} <= set(report.checks)
    facts = bench(text_bundle, tokens=2, rounds=1)
    assert facts["text"]["per_s"] > 0
    assert facts["drawing"] is None


def test_a_bundle_for_drawing_is_measured_and_compared_in_drawing_alone(
    drawing_bundle: Path, tiny_checkpoint: Path
):
    done = CliRunner().invoke(app, ["bench", str(drawing_bundle), "--tokens", "2", "--rounds", "1"])
    assert done.exit_code == 0, done.output
    assert "positions/s" in done.stdout
    assert "tokens/s" not in done.stdout
    [report] = verify(drawing_bundle, tiny_checkpoint, gates=["rounding"])
    assert {check.name.partition(":")[0] for check in report.checks["rounding"]} == {"drawings"}


def test_an_export_of_some_modes_refuses_to_quantise_what_it_leaves_out(
    tiny_checkpoint: Path, tmp_path: Path
):
    line = [
        "export",
        str(tiny_checkpoint),
        str(tmp_path / "b"),
        "--only",
        "drawing",
        "--precision",
        "cpu-int4",
    ]
    done = CliRunner().invoke(app, [*line, "quantize.graphs=[sample_text]"])
    assert done.exit_code != 0
    assert "'sample_text' is not exported with only=drawing" in str(done.output) + str(done.exception)
