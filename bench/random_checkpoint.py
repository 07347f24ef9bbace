"""Checkpoints of random weights at any size, written as a stream: the model is never in memory.

python bench/random_checkpoint.py model/janus_pro_1b FOLDER --precision fp16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from janus_export.bundle.files import Stored, write_stream
from janus_modular.checkpoints import ModelAssembly, native
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig

KINDS = {"bf16": (torch.bfloat16, "BF16"), "fp16": (torch.float16, "F16")}
SHARD = 5_000_000_000  # bytes
NOISE = 1 << 23  # random numbers, repeated as often as it takes


def write_janus(config: str, changes: Sequence[str], precision: str, folder: Path) -> int:
    """Write a shipped model config with random weights; return the bytes of the weights."""
    # Random weights have no tokenizer: the byte tokenizer's ids fit any vocabulary.
    changes = [*changes, "processor.tokenizer=bytes", "processor.template=janus"]
    assembly = ModelAssembly.from_config(resolve(load(config, changes), ModelConfig), device="meta")
    folder.mkdir(parents=True)
    native.write_description(assembly, folder, name=folder.name)
    return write_weights(native.stored_tensors(assembly.model), precision, folder)


def write_weights(tensors: Mapping[str, torch.Tensor], precision: str, folder: Path) -> int:
    """Write random weights of these names and shapes, in shards with an index; return their bytes."""
    dtype, kind = KINDS[precision]
    noise = (torch.randn(2 * NOISE, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    bits = noise.view(torch.int16).numpy()
    shards: list[list[Stored]] = [[]]
    for number, (name, tensor) in enumerate(tensors.items()):
        shape = tuple(tensor.shape)
        if tensor.is_floating_point():
            one = Stored(name, kind, shape, partial(_random, bits, number, tensor.numel()))
        else:
            assert tensor.dtype == torch.int64, f"{name} is {tensor.dtype}"
            one = Stored(name, "I64", shape, lambda shape=shape: [np.zeros(shape, np.int64)])
        if shards[-1] and sum(other.size for other in shards[-1]) + one.size > SHARD:
            shards.append([])
        shards[-1].append(one)
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_stream(shard, folder).rename(folder / file)
        where |= {one.name: file for one in shard}
    total = sum(one.size for shard in shards for one in shard)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _random(bits: Any, seed: int, count: int) -> Iterator[Any]:
    """Yield ``count`` numbers: the noise, from another place on for every tensor."""
    begin = seed * 1_000_003 % NOISE
    for at in range(0, count, NOISE):
        yield bits[begin : begin + min(NOISE, count - at)]


def main() -> None:
    """Write one; print how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", help="a shipped model config")
    parser.add_argument("folder", type=Path, help="to write; must not exist")
    parser.add_argument("--precision", choices=KINDS, default="bf16")
    arguments = parser.parse_args()
    size = write_janus(arguments.config, [], arguments.precision, arguments.folder)
    print(f"{arguments.folder}: {size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
