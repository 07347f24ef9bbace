"""Training on images of several sizes: packed rows have the losses of each sequence, and a run learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from janus_modular import ConfigError
from janus_modular.checkpoints import ModelAssembly
from janus_modular.janus import Janus
from janus_modular.model.batch import MixedImages
from janus_modular.plugins import default_plugins
from janus_modular.training.dry_run import dry_run
from janus_modular.training.memory import largest_batches
from janus_modular.training.processes import Processes
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.train import train

from .conftest import Make
from .objective_configs import CONTRASTIVE, MakeStage
from .test_processes import Ranks, gradients

PIXELS = {"height": 32, "width": 32, "resize": "native", "multiple": 8}
SIZES = {"red": (90, 30), "green": (30, 90), "blue": (40, 40), "white": (64, 33)}


@pytest.fixture
def settings(data: Path) -> dict[str, Any]:
    """The images of the folder get different sizes."""
    for name, size in SIZES.items():
        Image.open(data / f"{name}.png").resize(size).save(data / f"{name}.png")
    return {"model__understanding__encoder__pixels": PIXELS}


def test_training_lowers_the_loss(make: Make, settings: dict[str, Any], metrics: Any) -> None:
    config = make(**settings, schedule__steps=12)
    console = Console(record=True, width=200)
    dry_run(config, default_plugins(), console)
    text = console.export_text()
    assert "tokens" in text
    finished = Janus.from_pretrained(train(config, quiet=True), device="cpu")
    assert finished.processor.pixels.resize == "native"
    losses = [line["loss/text"] for line in metrics(config)]
    assert losses[-1] < losses[0] - 0.5  # measured: from 5.8 to 3.2
    assert all(line.get("mfu", 0) >= 0 for line in metrics(config))


def test_batches_of_a_step_hold_several_sizes(make: Make, settings: dict[str, Any]) -> None:
    config = make(**settings, mixture=json.dumps({"read": 4, "draw": 1, "text": 1}), batch=12)
    assert config.model is not None
    assembly = ModelAssembly.from_config(config.model)
    sources = open_sources(config, default_plugins())
    builder = batch_builder(config, sources, assembly.model, assembly.processor)
    batches = [batch for step in range(2) for batch in builder.build(step).batches]
    images = [batch.understanding_pixels for batch in batches]
    mixed = [pixels for pixels in images if isinstance(pixels, MixedImages)]
    assert mixed
    shapes = {tuple(group.shape[-2:]) for pixels in mixed for group in pixels.groups}
    assert shapes <= {(16, 48), (48, 16), (32, 32), (24, 40)}
    assert len(shapes) > 2


FSDP = {"backbone": "fsdp", "understanding.encoder": "fsdp"}


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 6},
        {"batch": 6, "parallel": FSDP},
        {"batch": 5, "parallel": FSDP, "mixture": {"read": 4, "draw": 1, "text": 0}, "accumulate": 2},
    ],
    ids=["ddp", "fsdp", "fsdp, micro-batches"],
)
def test_a_step_of_two_processes_is_that_of_one(
    make: Make, settings: dict[str, Any], ranks: Ranks, changes: dict[str, Any]
) -> None:
    """The encoder runs once for each size of images, of which one process has more than the other."""
    config = make(**settings, **changes)
    want, _ = gradients(config, Processes())
    outcomes = ranks(2, lambda rank: gradients(config, Processes.from_environment()))
    assert [outcome.error for outcome in outcomes] == ["", ""]
    for outcome in outcomes:
        got, _ = outcome.result
        for name, expected in want.items():
            assert (expected is None) is (got[name] is None), name
            if expected is not None:
                # as in test_processes.py: 1e-6 of the gradient's scale
                limit = 1e-6 * max(np.abs(expected).max(), 1)
                assert np.abs(got[name] - expected).max() <= limit, name


def test_the_contrastive_objective_refuses_images_of_several_sizes(make_stage: MakeStage) -> None:
    pixels = "model.understanding.encoder.pixels={height: 32, width: 32, resize: native, multiple: 8}"
    config = make_stage(CONTRASTIVE, pixels, "learn=[understanding.encoder]")
    with pytest.raises(ConfigError, match="resize: found native; expected letterbox, crop or stretch"):
        train(config, quiet=True)


def test_memory_is_estimated_for_the_batch_with_the_most_pixels(make: Make, settings: dict[str, Any]) -> None:
    config = make(**settings)
    assert config.model is not None
    sources = open_sources(config, default_plugins())
    assembly = ModelAssembly.from_config(config.model)
    [batch, *_] = batch_builder(config, sources, assembly.model, assembly.processor).build(0).batches
    small = MixedImages([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 16)], [(0, 0), (1, 0)])
    large = torch.zeros(1, 3, 32, 32)
    few_pixels, many_pixels = (replace(batch, understanding_pixels=pixels) for pixels in (small, large))
    assert any(chosen is many_pixels for chosen in largest_batches([few_pixels, many_pixels]))
