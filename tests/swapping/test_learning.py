"""Components that fit together, selected on the command line, are trained together."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular import ImageInput, ImageTarget, Message, Plugins, Sample, Text
from janus_modular.cli.app import app
from janus_modular.config import load
from janus_modular.model.batch import Batch, collate
from janus_modular.model.model import JanusModel
from janus_modular.processing.processor import Processor
from janus_modular.training.trainable import set_trainable


def image(seed: int, brightest: int = 255) -> Image.Image:
    chance = np.random.default_rng(seed)
    return Image.fromarray(chance.integers(0, brightest, (40, 56, 3), np.uint8, endpoint=True))


def lesson(processor: Processor) -> Batch:
    """An image that is read and one that is drawn, in one sample; a dark one that is read in another."""
    samples = [
        Sample(
            [
                Message("user", [ImageInput(image(0)), Text("Draw it again.")]),
                Message("assistant", [Text("Here it is.", supervised=True), ImageTarget(image(1))]),
            ]
        ),
        Sample(
            [
                Message("user", [ImageInput(image(2, brightest=40)), Text("What is it?")]),
                Message("assistant", [Text("Night.", supervised=True)]),
            ]
        ),
    ]
    return collate([processor.sequence(sample) for sample in samples], pad=processor.pad_id)


def assert_it_is_what_the_table_says(model: JanusModel, row: Any, table: ModuleType) -> None:
    """What rules are about, and what each word stands for."""
    tokenizer, encoder = (table.TABLES[name][getattr(row, name)] for name in ("tokenizer", "encoder"))
    generation: Any = model.generation
    assert model.understanding.encoder.feature_dim == encoder.width
    assert model.backbone.hidden_size == table.WIDTH
    assert generation.embedding.embedding_dim == tokenizer.width
    assert len(generation.codebooks) == tokenizer.codes
    assert (generation.height, generation.width) == table.DRAWN


def test_every_two_parts_learn_together(row: Any, table: ModuleType, plugins: Plugins):
    """In stage 2, all that learns gets a gradient that is finite and not zero, and nothing else gets one."""
    model, processor = row.build(plugins)
    assert_it_is_what_the_table_says(model, row, table)
    set_trainable(model, load("train/janus_pro/stage2")["learn"])
    losses = model(lesson(processor)).losses

    assert losses.keys() == {"text", "image"}
    assert losses["image"].shape == (model.generation.num_tokens,)
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, f"{name} is frozen"
            continue
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), f"{name} learns nothing"


def test_any_three_parts_learn_together(of_three_parts: Any, table: ModuleType, plugins: Plugins):
    """Encoder, image tokenizer and backbone, in every combination; the encoder learns too."""
    row = of_three_parts
    words = ("--plugin", str(table.EXAMPLE), "config", "validate", "tiny", *row.words)
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert "tiny is valid." in done.output

    model, processor = row.build(plugins)
    encoder: Any = model.understanding.encoder
    assert row.encoder.split("-")[0] in type(getattr(encoder, "model", encoder)).__name__.lower()
    assert model.backbone.model.config.model_type == row.backbone  # type: ignore[attr-defined]
    losses = model(lesson(processor)).losses
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("generation.tokenizer."):
            assert parameter.grad is None, f"{name}: its codes are targets"
        elif not name.startswith("understanding.encoder."):  # which may have weights for other uses
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), f"{name} learns nothing"
    assert any(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())
