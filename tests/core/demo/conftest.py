"""A demo cut down to a handful of steps."""

from __future__ import annotations

import pytest

PHASES = (
    "classifier",
    "tokenizer",
    "encoder",
    "stages.words",
    "stages.stage1",
    "stages.stage2",
    "stages.stage3",
)


@pytest.fixture(scope="session")
def quick() -> list[str]:
    """Overrides with which the shipped demo takes seconds."""
    return [
        *(f"{name}.schedule.steps=2" for name in PHASES),
        *(f"{name}.batch=7" for name in PHASES),
        "model.understanding.encoder.layers=1",
        "model.backbone.config.num_hidden_layers=1",
        "model.generation.tokenizer.continuous_steps=1",
        "held_out.split=validation",
        "count=20",
    ]
