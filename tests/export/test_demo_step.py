"""The demo's last step: exported, proven, drawn again from the bundle."""

from __future__ import annotations

from pathlib import Path

from janus_export.demo_step import bundle
from janus_modular.demo.finishing import Trained, find_steps


def test_the_demo_finds_it():
    assert find_steps(["bundle"]) == {"bundle": bundle}


def test_the_bundle_draws_what_torch_draws_and_the_table_says_what_was_proven(
    tiny_checkpoint: Path, tmp_path: Path
):
    shown = bundle(Trained(tiny_checkpoint, tmp_path, ["a cat", "two dogs"], 2.0, 0.7, seed=3))
    assert shown.figures["bundle_codes_equal"] == 1
    failed = {(variant, gate) for variant, gate, result in shown.rows if "wanted" in result}
    assert failed == {("cpu-int4", "rounding")}  # large random weights have nothing that survives 4 bits
    assert shown.figures["bundle_variants_passed"] == 2 / 3
    assert ("fp32", "drawing", "2 of 2 passed") in shown.rows
    assert ("fp16", "range", "1 of 1 passed") in shown.rows
    assert [len(pictures) for pictures in shown.strips.values()] == [2, 2]
    assert (tmp_path / "bundle/manifest.json").is_file()
