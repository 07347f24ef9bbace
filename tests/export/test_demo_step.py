"""The demo's last step: exported, proven, drawn again from the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_export import demo_step
from janus_export.bundle.bundle import load_bundle
from janus_export.demo_step import bundle
from janus_modular.demo.finishing import Trained, find_steps
from janus_modular.errors import MissingExtraError


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
    assert [len(images) for images in shown.strips.values()] == [2, 2]
    engines = [what for variant, what, _ in shown.rows if variant == "fp16, tensorrt-rtx, 8.9"]
    assert engines == [f"engine of {graph}" for graph in load_bundle(tmp_path / "bundle").graphs]
    assert shown.figures["engines_built"] == len(engines) == 7


def test_without_tensorrt_it_says_what_is_missing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError("TensorRT-RTX", "rtx")

    monkeypatch.setattr(demo_step, "build", missing)
    [(_, what, result)] = demo_step.build_engines(tiny_bundle)
    assert (what, result) == (
        "engines",
        "not built: TensorRT-RTX needs the extra 'rtx': pip install 'janus-modular[rtx]'",
    )
