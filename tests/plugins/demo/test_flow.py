"""The demo whose model draws by rectified flow, and what its config may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_modular.config import load, resolve
from janus_modular.errors import ConfigError
from janus_modular.janus import Janus
from janus_plugins.demo.ablation import run_ablation
from janus_plugins.demo.run import run_demo
from janus_plugins.demo.schema import DemoConfig


@pytest.mark.slow
def test_it_has_the_metrics_of_a_model_without_codes(quick_flow: dict[str, Any], tmp_path: Path) -> None:
    report = run_demo(resolve(quick_flow, DemoConfig), tmp_path / "demo", quiet=True)
    metrics = {name for name in report if not name.startswith("settings.")}
    assert {"reading_accuracy", "drawing_accuracy", "drawing_accuracy_g1", "psnr_db"} <= metrics
    assert "codes_used" not in metrics
    page = (tmp_path / "demo/report.html").read_text("utf-8")
    assert "guidance 2.0, steps 30" in page
    assert "codes_used" not in page.partition("All settings")[0]
    drawn = Janus.from_pretrained(tmp_path / "demo/model").draw("Draw the digit three.", steps=2)
    assert drawn[0].size == (32, 32)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"drawings": {"drawing_accuracy": {"temperature": 1.0}}},
            "drawing_accuracy: temperature: no such setting",
        ),
        ({"drawings": {"drawing_accuracy": {"seed": 3}}}, "drawings.drawing_accuracy: seed: set by the demo"),
        ({"drawings": {"drawing_accuracy": {"steps": 0}}}, "drawings.drawing_accuracy: steps: found 0"),
        ({"thresholds": {"drawing_acuracy": 0.9}}, "thresholds: drawing_acuracy; expected some of"),
    ],
)
def test_a_setting_without_effect_is_an_error_before_training(
    change: dict[str, Any], problem: str, quick_flow: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=problem):
        run_demo(resolve(quick_flow | change, DemoConfig), tmp_path / "demo", quiet=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]


def test_an_ablation_needs_an_image_tokenizer(quick_flow: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'rectified-flow' has no image tokenizer"):
        run_ablation(quick_flow, tmp_path / "ablation", quiet=True)
    assert not list(tmp_path.rglob("parts"))


@pytest.mark.proof
def test_it_meets_its_thresholds(tmp_path: Path) -> None:
    config = resolve(load("demo/digits_flow"), DemoConfig)
    report = run_demo(config, tmp_path / "demo", quiet=True)
    assert [name for name, least in config.thresholds.items() if report[name] < least] == []
    assert report["bundle_variants_passed"] == 1
    assert report["bundle_latents_error"] < 1e-3  # of thirty steps in fp32, each rounded
