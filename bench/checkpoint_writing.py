"""What writing checkpoints costs of a run's throughput: at once, and in the background.

    OMP_NUM_THREADS=1 python bench/checkpoint_writing.py [--steps 20] [--rounds 5] [--batch 24]

The model and the batches are those of training_overhead.py, in a single process. The contestants train the
same model and alternate in one process; each round has ``--steps`` steps, and a checkpoint after the second.
Training waits while a checkpoint is written at once, or while its tensors are copied.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from training_overhead import CPU, prepare, training_config, write_texts

from janus_modular.checkpoints import ModelAssembly
from janus_modular.training.checkpoint_writer import CheckpointWriter
from janus_modular.training.engine import Engine
from janus_modular.training.objective import step_losses


def main() -> None:
    """Print the medians and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=24)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        config = training_config(write_texts(Path(folder)), 1088)
        config = replace(config, output=f"{folder}/run", batch=arguments.batch)
        assert config.model is not None
        assembly = ModelAssembly.from_config(config.model)
        model = assembly.model.train()
        model.generation.tokenizer.requires_grad_(False)  # type: ignore[union-attr]
        batches = prepare(config, assembly, 2) * (arguments.steps // 2)
        engine: Engine[Any] = Engine(
            model, lambda batch: step_losses(model, batch, CPU), config.optimizer, config.schedule
        )
        writer = CheckpointWriter(assembly, engine, config)

        def contestant(save: Callable[[], None]) -> Callable[[], float]:
            def run() -> float:
                """Run the steps; return for how many seconds they waited for a checkpoint."""
                waited = 0.0
                for number, batch in enumerate(batches):
                    engine.step(batch)
                    start = time.perf_counter()
                    writer.poll()
                    if number == 1:
                        save()
                    waited += time.perf_counter() - start
                writer.complete()
                return waited

            return run

        contestants = {
            "no checkpoint": contestant(lambda: None),
            "a checkpoint at once": contestant(lambda: writer.save({})),
            "a checkpoint in the background": contestant(lambda: writer.save({}, background=True)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        waits: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(arguments.rounds + 1):
            for name, run in contestants.items():
                start = time.perf_counter()
                waited = run()
                if number:  # the first round is not counted
                    seconds[name].append(time.perf_counter() - start)
                    waits[name].append(waited)
        assert writer.last is not None
        size = sum(path.stat().st_size for path in writer.last.iterdir())
        count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.1f} M parameters, a checkpoint of {size / 1e6:.0f} MB, {arguments.steps} steps")
    print(f"{torch.get_num_threads()} threads")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["no checkpoint"], strict=True))
        waited = statistics.median(waits[name])
        print(f"{name}: {statistics.median(values):.2f} s, {ratio - 1:+.1%}; waited {waited:.3f} s")


if __name__ == "__main__":
    main()
