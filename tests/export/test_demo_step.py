"""The last phase of the demo: export, verification, drawings from the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_export import demo_step
from janus_export.bundle.bundle import load_bundle
from janus_export.demo_step import bundle
from janus_modular.errors import MissingExtraError
from janus_plugins.demo.post_training import find_steps


def test_the_demo_finds_it():
    assert find_steps(["bundle"]) == {"bundle": bundle}


@pytest.mark.slow  # a whole export, its verification and seven engines
def test_the_bundle_draws_what_torch_draws_and_the_table_says_what_was_proven(
    tiny_checkpoint: Path, tmp_path: Path
):
    section = bundle(
        tiny_checkpoint,
        tmp_path,
        prompts=["a cat", "two dogs"],
        settings={"guidance": 2.0, "temperature": 0.7, "seed": 3},
    )
    assert section.metrics["bundle_codes_equal"] == 1
    failed = {(variant, gate) for variant, gate, result in section.rows if "expected" in result}
    assert failed == {("cpu-int4", "rounding")}  # large random weights have nothing that survives 4 bits
    assert section.metrics["bundle_variants_passed"] == 2 / 3
    assert ("fp32", "drawing", "2 of 2 passed") in section.rows
    assert ("fp16", "range", "1 of 1 passed") in section.rows
    assert [len(images) for images in section.strips.values()] == [2, 2]
    engines = [what for variant, what, _ in section.rows if variant == "fp16, tensorrt-rtx, 8.9"]
    assert engines == [f"engine of {graph}" for graph in load_bundle(tmp_path / "bundle").graphs]
    assert section.metrics["engines_built"] == len(engines) == 8


def test_without_tensorrt_it_says_what_is_missing(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError("TensorRT-RTX", "rtx")

    monkeypatch.setattr(demo_step, "build", missing)
    [(_, what, result)] = demo_step.build_engines(tiny_bundle)
    assert (what, result) == (
        "engines",
        "not built: TensorRT-RTX needs the extra 'rtx': pip install 'janus-modular[rtx]'",
    )
