"""The demo, shortened to seconds."""

from __future__ import annotations

from typing import Any

import pytest

from janus_modular.config import load


def shortened(name: str, stages: tuple[str, ...], *overrides: str) -> dict[str, Any]:
    """Return a shipped demo with some of its stages and few steps, as plain mappings."""
    phases = ("classifier", *(f"stages.{stage}" for stage in stages))
    few = [
        *(f"{phase}.schedule.steps=2" for phase in phases),
        *(f"{phase}.batch=7" for phase in phases),
        "model.understanding.encoder.layers=1",
        "model.backbone.config.num_hidden_layers=1",
        "held_out.split=validation",
        "count=20",
        "post_training_steps=[]",
    ]
    raw = load(name, [*few, *overrides])
    raw["stages"] = {stage: raw["stages"][stage] for stage in stages}
    return raw


@pytest.fixture
def quick() -> dict[str, Any]:
    """Return the demo that draws codes, shortened."""
    stages = ("tokenizer", "encoder", "stage1", "stage2")
    return shortened("demo/digits", stages, "model.generation.tokenizer.continuous_steps=1")


@pytest.fixture
def quick_flow() -> dict[str, Any]:
    """Return the demo that draws by rectified flow, shortened."""
    return shortened("demo/digits_flow", ("autoencoder", "encoder", "stage2"))
