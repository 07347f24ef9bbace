"""Training throughput of stage 2: tokens per second and peak memory, at a real shape with random weights.

    python bench/training_throughput.py [--size 1b|tiny] [--device cuda|cpu] [--steps 5] [A.B=C ...]

Weights and AdamW are in float32, computation is in bfloat16 on a GPU. A third of the samples are images to be
read, a third images to be drawn, a third texts; rows of 1,088 positions are packed. Batches are made before.
Prints one JSON object. Overrides change the training config, for example compile=true.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from training_overhead import write_texts

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.plugins import default_plugins
from janus_modular.training.compilation import compile_blocks
from janus_modular.training.engine import Engine
from janus_modular.training.objective import step_losses
from janus_modular.training.parallel import checkpoint_activations
from janus_modular.training.run_setup import autocast_dtype, batch_builder, open_sources
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_builder import StepBatch
from janus_modular.training.trainable import set_trainable

SIZES = {"1b": ("model/janus_pro_1b", 48, 6), "tiny": ("tiny", 12, 2)}
"""The model config, samples per step and micro-batches per step."""
LENGTH = 1088  # positions per packed row
STAGE_2 = [
    "understanding.adaptor",
    *(f"generation.{name}" for name in ("embedding", "adaptor", "head")),
    "backbone",
]


def training_config(size: str, texts: Path, overrides: list[str]) -> TrainConfig:
    """Return stage 2 on digits, which are scaled to the model's image size, and on texts."""
    name, batch, accumulate = SIZES[size]
    model = load(name, [f"backbone.config.max_position_embeddings={LENGTH}"] if size == "tiny" else [])
    raw = {
        "model": {**model, "processor": {"tokenizer": "bytes", "template": "janus"}},
        "learn": STAGE_2,
        "sources": {
            "read": {"name": "digits", "task": "read"},
            "draw": {"name": "digits", "task": "draw"},
            "text": {"name": "jsonl", "path": str(texts)},
        },
        "mixture": {"read": 1, "draw": 1, "text": 1},
        "batch": batch,
        "length": LENGTH,
        "accumulate": accumulate,
        "schedule": {"steps": 1000},
        "trackers": [],
    }
    return resolve(load(raw, overrides), TrainConfig)


def measure(config: TrainConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """Train for some steps after one that is not counted; return the figures."""
    assert config.model is not None
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(config.model, device=device)
    model = assembly.model.train()
    set_trainable(model, config.learn)
    compile_blocks(model, config.compile)
    checkpoint_activations(model, config.activation_checkpointing)
    builder = batch_builder(config, open_sources(config, default_plugins()), model, assembly.processor)
    engine: Engine[StepBatch] = Engine(
        model,
        lambda batch: step_losses(model, batch, device),
        config.optimizer,
        config.schedule,
        autocast=autocast_dtype(config.dtype, device),
    )
    batches = [builder.build(step) for step in range(steps + 1)]
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        engine.step(batch)  # ends with metrics on the host, so a GPU has finished too
        seconds.append(time.perf_counter() - start)
    tokens = [sum(batch.tokens.values()) for batch in batches[1:]]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "trained_parameters": sum(p.numel() for p in engine.parameters),
        "tokens_per_step": round(sum(tokens) / steps),
        "micro_batches": config.accumulate,
        "step_s": median(seconds[1:]),
        "tokens_per_s": median(count / each for count, each in zip(tokens, seconds[1:], strict=True)),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        config = training_config(arguments.size, write_texts(Path(folder)), arguments.overrides)
        print(json.dumps(measure(config, torch.device(arguments.device), arguments.steps), indent=2))


if __name__ == "__main__":
    main()
