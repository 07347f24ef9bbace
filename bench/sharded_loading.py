"""Peak memory of each of several processes that start from a checkpoint, with sharded blocks and without.

    python bench/sharded_loading.py [--layers 12] [--world 2]

The model is a decoder of hidden size 1024 with the rest of a small Janus around it, in float32. Mapped files
are not counted: the system can drop their pages.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from janus_export.process_memory import AnonymousPeak, anonymous_memory
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.model.model import JanusModel
from janus_modular.plugins import default_plugins
from janus_modular.training.initial_model import initial_model
from janus_modular.training.parallel import shard_components
from janus_modular.training.processes import Processes
from janus_modular.training.schema import TrainConfig

CPU = torch.device("cpu")
DECODER = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 12,
}


def training_config(start: dict[str, object], overrides: list[str]) -> TrainConfig:
    """Return a config that trains all of a model."""
    digits = {"sources": {"read": {"name": "digits", "task": "read"}}, "mixture": {"read": 1}}
    raw = {"learn": ["understanding", "backbone"], **digits, **start}
    return resolve(load(raw, overrides), TrainConfig)


def peak(case: str, checkpoint: Path, rank: int, world: int, port: int) -> float:
    """Return the growth of a process's anonymous memory, in MB, while the model is loaded and sharded."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    policies = {} if case == "whole" else {"backbone": "fsdp"}
    config = training_config({"init": str(checkpoint), "parallel": policies}, [])

    def shard(model: JanusModel) -> None:
        shard_components(model, config.parallel, device=CPU, world=world, dtype=None)

    processes = Processes.from_environment()
    with processes.started(CPU):
        initial_model(config, default_plugins(), "meta")  # imports what is needed
        processes.gather(None)
        start = anonymous_memory() or 0
        with AnonymousPeak() as watch:
            if case == "sharded":
                assembly = initial_model(config, default_plugins(), CPU, shard=shard)
            else:
                assembly = initial_model(config, default_plugins(), CPU)
                shard(assembly.model)
        processes.gather(None)
    return ((watch.bytes or 0) - start) / 1e6


def main() -> None:
    """Print the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--world", type=int, default=2)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        decoder = DECODER | {"num_hidden_layers": arguments.layers}
        overrides = [f"model.backbone.config.{key}={value}" for key, value in decoder.items()]
        config = training_config({"model": "tiny"}, overrides)
        assert config.model is not None
        assembly = ModelAssembly.from_config(config.model)
        size = sum(p.numel() * p.element_size() for p in assembly.model.parameters())
        print(f"weights: {size / 1e6:,.0f} MB, {arguments.world} processes")
        save(assembly, checkpoint := Path(folder) / "model")
        del assembly
        for case in ("whole", "whole, then sharded", "sharded"):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            with multiprocessing.get_context("spawn").Pool(arguments.world) as pool:
                ranks = [(case, checkpoint, rank, arguments.world, port) for rank in range(arguments.world)]
                peaks = pool.starmap(peak, ranks, chunksize=1)
            print(f"{case}: {', '.join(f'{value:,.0f}' for value in peaks)} MB")


if __name__ == "__main__":
    main()
