"""The complete demo reaches its thresholds: a separate file, because the test takes long."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest

from janus_modular.config import load, resolve
from janus_modular.janus import Janus
from janus_modular.plugins import default_plugins
from janus_plugins.demo.evaluation import draw, recognised
from janus_plugins.demo.phases import Demo
from janus_plugins.demo.run import run_demo
from janus_plugins.demo.schema import DemoConfig

COUNT = 1_000
"""Drawings that show what guidance gains: the standard error of the difference is 0.01; of 200, 0.025."""
SIGNIFICANT = 3.0
"""Standard errors that a gain must have: one by chance has as many in one of 700 runs."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in (1, 2))])
def test_meets_its_thresholds(seed: int, tmp_path: Path) -> None:
    config = resolve(load("demo/digits", [f"seed={seed}"]), DemoConfig)
    report = run_demo(config, tmp_path / "demo", quiet=True)
    assert [name for name, least in config.thresholds.items() if report[name] < least] == []
    assert (report["bundle_variants_passed"], report["bundle_codes_equal"]) == (1, 1)

    demo = Demo(config, tmp_path / "demo", default_plugins(), quiet=True)
    classifier, held_out = demo.classifier(), demo.open(config.held_out)
    janus = Janus.from_pretrained(tmp_path / "demo" / "model", device="cpu")
    guided, alone = (
        recognised(classifier, draw(janus, held_out, config.drawings[name], COUNT, seed))
        for name in ("drawing_accuracy_t1", "drawing_accuracy_t1_g1")
    )
    standard_error = sqrt((guided * (1 - guided) + alone * (1 - alone)) / COUNT)
    assert guided >= alone + SIGNIFICANT * standard_error or alone >= 0.95
