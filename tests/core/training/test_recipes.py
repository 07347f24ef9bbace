"""Shipped recipes of fine-tuning: each runs, on a small model, and trains what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train


@pytest.mark.parametrize("recipe", ["understanding", "drawing", "both", "stage3"])
def test_a_fine_tuning_recipe_trains_what_it_says_of_a_checkpoint(
    recipe: str, make: Any, tmp_path: Path, data: Path
) -> None:
    """The recipe's wrappers, what learns, its data and supervision; the model and the sizes are small."""
    start = train(make(schedule={"steps": 1}), quiet=True)
    shipped_recipe = load(f"train/finetune/{recipe}")
    files = {"draw": "draw", "generation": "draw", "text": "text"}
    sources = {
        name: {**source, "path": str(data / f"{files.get(name, 'read')}.jsonl")}
        for name, source in shipped_recipe["sources"].items()
    }
    small = {"init": str(start), "sources": sources, "batch": 4, "length": 256, "accumulate": 1}
    small |= {"schedule": {"steps": 2}, "output": str(tmp_path / recipe), "workers": 0, "device": "cpu"}
    small |= {"trackers": []}
    folder = train(resolve(load({**shipped_recipe, **small}), TrainConfig), quiet=True)
    weights = ModelAssembly.from_checkpoint(folder).model.state_dict()
    learned = [name for name, weight in weights.items() if ".lora_B." in name and bool(weight.any())]
    wraps = shipped_recipe.get("wrap", {})
    assert all(any(name.startswith(f"{path}.") for name in learned) for path in wraps)
    assert {name for name in learned if not name.startswith(tuple(f"{path}." for path in wraps))} == set()
