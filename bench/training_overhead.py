"""A training step against a bare PyTorch loop, and packed rows against padded rows.

    OMP_NUM_THREADS=2 python bench/training_overhead.py [--steps 12] [--rounds 5]

A decoder of 4 layers with hidden size 256 learns from images that are read and drawn (30 to 80 positions) and
from texts of 20 to 1,000 bytes, a position each; each has a third of the samples. The contestants
train models of the same weights on the same samples and alternate in one process; batches are made before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.plugins import default_plugins
from janus_modular.training.engine import Engine
from janus_modular.training.objective import step_losses
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.schema import TrainConfig
from janus_modular.training.step_builder import StepBatch

CPU = torch.device("cpu")
DECODER = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1088,
}


def write_texts(folder: Path) -> Path:
    """Write texts whose lengths are spread evenly on a logarithmic scale."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(20), np.log(1000), 500)).astype(int)
    lines = [json.dumps({"text": "".join(rng.choice([*"abcdefgh "], length))}) for length in lengths]
    (path := folder / "text.jsonl").write_text("\n".join(lines), "utf-8")
    return path


def training_config(texts: Path, length: int | None) -> TrainConfig:
    """Return a config that reads and draws digits, and learns texts."""
    raw = {
        "model": "tiny",
        "learn": ["understanding", "generation", "backbone"],
        "sources": {
            "read": {"name": "digits", "task": "read"},
            "draw": {"name": "digits", "task": "draw"},
            "text": {"name": "jsonl", "path": str(texts)},
        },
        "mixture": {"read": 1, "draw": 1, "text": 1},
        "batch": 24,
        "length": length,
        "schedule": {"steps": 1000},
        "trackers": [],
    }
    overrides = [f"model.backbone.config.{key}={value}" for key, value in DECODER.items()]
    return resolve(load(raw, overrides), TrainConfig)


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: StepBatch) -> None:
    """Train one step as a plain loop does."""
    optimizer.zero_grad(set_to_none=True)
    for micro_batch in batch.batches:
        losses = model(micro_batch).losses
        (sum(loss.sum() for loss in losses.values()) / batch.supervised).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def prepare(config: TrainConfig, assembly: ModelAssembly, steps: int) -> list[StepBatch]:
    """Return the batches of the first steps."""
    sources = open_sources(config, default_plugins())
    builder = batch_builder(config, sources, assembly.model, assembly.processor)
    return [builder.build(step) for step in range(steps)]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        texts = write_texts(Path(folder))
        config = training_config(texts, 1088)
        assert config.model is not None
        assembly = ModelAssembly.from_config(config.model)
        packed = prepare(config, assembly, arguments.steps)
        padded = prepare(training_config(texts, None), assembly, arguments.steps)

    def contestant(batches: list[StepBatch], is_bare: bool) -> Callable[[], None]:
        model = deepcopy(assembly.model).train()
        model.generation.tokenizer.requires_grad_(False)  # type: ignore[union-attr]
        engine: Engine[Any] = Engine(
            model, lambda batch: step_losses(model, batch, CPU), config.optimizer, config.schedule
        )

        def run() -> None:
            for batch in batches:
                if is_bare:
                    bare_step(model, engine.optimizer, batch)
                else:
                    engine.step(batch)

        return run

    contestants = {
        "bare loop": contestant(packed, is_bare=True),
        "trainer": contestant(packed, is_bare=False),
        "trainer, padded rows": contestant(padded, is_bare=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(arguments.rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if number:  # the first round is not counted
                seconds[name].append(time.perf_counter() - start)
    tokens = {
        name: sum(sum(batch.tokens.values()) for batch in batches)
        for name, batches in (("packed", packed), ("padded", padded))
    }
    assert tokens["packed"] == tokens["padded"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds["trainer"], strict=True))
        for name in contestants
    }
    for name, values in seconds.items():
        rate = tokens["packed"] / statistics.median(values)
        print(f"{name}: {statistics.median(values):.2f} s, {rate:,.0f} useful tokens/s")
    print(f"trainer over bare loop: {1 / ratios['bare loop'] - 1:+.1%}")
    print(f"packed over padded rows: {ratios['trainer, padded rows']:.2f} times the useful tokens/s")


if __name__ == "__main__":
    main()
