"""Rectified flow with every backbone, and with encoders of other sizes: trained a step, and drawn from."""

from __future__ import annotations

from itertools import cycle
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular import Janus, Plugins
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.batch import collate
from janus_modular.sequence import ImageTarget, Message, Sample, Text

ENCODERS = ("vit", "siglip2", "dinov2", "joined")
BACKBONES = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "smollm3", "granite",
    "stablelm", "cohere", "lora",
)  # fmt: skip
MASKED = {"mistral", "qwen2", "gemma2", "gemma3_text"}
"""Backbones with windows, which cannot hide a dropped condition in training."""


def test_every_backbone_is_in_a_row(table: ModuleType) -> None:
    assert set(BACKBONES) == table.BACKBONES.keys()


@pytest.mark.parametrize(("backbone", "encoder"), list(zip(BACKBONES, cycle(ENCODERS), strict=False)))
def test_a_step_and_a_drawing(backbone: str, encoder: str, table: ModuleType, plugins: Plugins) -> None:
    words = [
        f"backbone={table.BACKBONES[backbone].words}",
        f"understanding.encoder={table.ENCODERS[encoder].words}",
        "generation.align_layer=null",
        "processor.template=plain",
    ]
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(
        resolve(load("tiny_flow", words, plugins), ModelConfig, plugins), plugins
    )
    model: Any = assembly.model
    sample = Sample(
        [Message("user", [Text("a")]), Message("assistant", [ImageTarget(Image.new("RGB", (32, 32)))])]
    )
    sequences = [assembly.processor.sequence(sample, condition_dropout=drop) for drop in (False, True)]
    output = model(collate([sequences if backbone not in MASKED else sequences[:1]]))
    output.losses["image"].sum().backward()
    untrained = [name for name, weight in model.generation.named_parameters() if weight.grad is None]
    assert all(name.startswith("autoencoder.") for name in untrained)
    janus = Janus.of(assembly, plugins)
    together = janus.draw("a", n=2, steps=2, guidance=3, seed=1)
    alone = janus.draw("a", n=1, steps=2, guidance=3, seed=1)
    # at most the rounding of one value of 255: a batch sums in another order
    assert np.abs(np.asarray(together[0], np.int16) - np.asarray(alone[0], np.int16)).max() <= 1
