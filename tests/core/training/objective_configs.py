"""Small runs of the objectives that read examples: their configs, data and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.plugins import default_plugins
from janus_modular.training.objective import build_objective
from janus_modular.training.run_setup import open_sources, step_builder
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_builder import StepBuilder
from janus_modular.weights.files import open_weights

MakeStage = Callable[..., TrainConfig]

TEXT = {
    "name": "hf",
    "config": {
        "model_type": "llama",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 64,
    },
}
RECONSTRUCTION = {"name": "image-reconstruction"}
CONTRASTIVE = {"name": "sigmoid-contrastive", "text": TEXT, "bias": -2.0, "max_tokens": 12}
VQGAN = {
    "name": "vqgan",
    "channels": 8,
    "channel_multipliers": [1, 2],
    "residual_blocks": 1,
    "latent_channels": 8,
    "num_codes": 16,
    "code_dim": 4,
}


def add_noise(data: Path) -> None:
    """Add noise to the images of a folder: equal patches would have equally near codes."""
    rng = np.random.default_rng(0)
    for file in data.glob("*.png"):
        pixels = np.asarray(Image.open(file)) // 2 + rng.integers(128, size=(32, 32, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(file)


def stage_config(
    data: Path, output: Path, objective: Mapping[str, Any] | None, *overrides: str
) -> TrainConfig:
    """Return the config of a small run of an objective, with overrides."""
    is_contrastive = objective is CONTRASTIVE
    file = "read" if is_contrastive else "draw"
    options: dict[str, Any] = {"questions": ["Colour?"]} if is_contrastive else {"task": "draw"}
    raw = {
        "model": "tiny",
        "objective": objective,
        "learn": ["understanding.encoder" if is_contrastive else "generation.tokenizer"],
        "sources": {"images": {"name": "jsonl", "path": str(data / f"{file}.jsonl"), **options}},
        "mixture": {"images": 1},
        "batch": 4,
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": 3},
        "log_every": 1,
        "checkpoint_every": 100,
        "workers": 0,
        "device": "cpu",
        "output": str(output),
        "trackers": [{"name": "jsonl"}],
    }
    return resolve(load(raw, overrides), TrainConfig)


def start_of(config: TrainConfig) -> tuple[ModelAssembly, Any, StepBuilder]:
    """Return the model, the objective and the builder of batches with which a run begins."""
    plugins = default_plugins()
    torch.manual_seed(config.seed)
    assert config.model is not None
    assembly = ModelAssembly.from_config(config.model, plugins)
    objective = build_objective(config.objective, assembly.model, plugins, "cpu")
    return assembly, objective, step_builder(config, open_sources(config, plugins), assembly, objective)


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint: weights, and state of training but for the random states."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= dict(open_weights(file).items())
    return {name: x for name, x in tensors.items() if not name.startswith("training/random/")}
