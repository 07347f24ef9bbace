"""The demo, shortened to seconds."""

from __future__ import annotations

from typing import Any

import pytest

from janus_modular.config import load

STAGES = ("tokenizer", "encoder", "stage1", "stage2")
PHASES = ("classifier", *(f"stages.{name}" for name in STAGES))


@pytest.fixture
def quick() -> dict[str, Any]:
    """Return the shipped demo with four of its stages and few steps, as plain mappings."""
    overrides = [
        *(f"{name}.schedule.steps=2" for name in PHASES),
        *(f"{name}.batch=7" for name in PHASES),
        "model.understanding.encoder.layers=1",
        "model.backbone.config.num_hidden_layers=1",
        "model.generation.tokenizer.continuous_steps=1",
        "held_out.split=validation",
        "count=20",
        "post_training_steps=[]",
    ]
    raw = load("demo/digits", overrides)
    raw["stages"] = {name: raw["stages"][name] for name in STAGES}
    return raw
