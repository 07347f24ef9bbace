"""Decoder steps of Janus-Pro-1B: a bundle in ONNX Runtime, transformers, and onnxruntime-genai.

    python bench/decoder.py [--layers 24] [--rounds 5] [--keep FOLDER]

Random weights, two rows (what guidance takes for one image), one process. Everybody reads the same number
of positions first; then, round by round, each makes a few steps in turn, so that what disturbs the machine
disturbs all alike. Ours draws as a user does: backbone, head, guidance, the choice of a code among 16,384,
its embedding. The others choose a token among 16,384 and have less to do: no second layer in the head, no
guidance. genai rounds its head to int4 like the rest; ours stays in float32 unless an export asks for it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from decoder_contestants import (
    CAPACITIES,
    EAGER,
    FP32,
    GENAI,
    HEAD,
    INT4,
    LARGE,
    WIDE,
    Contestant,
    Stopwatch,
    bundle_contestants,
    genai_generate,
    transformers_generate,
)
from decoder_models import SHAPE, build

from janus_export.bench.bytes_read import read_bandwidth
from janus_export.bench.run import processor_name
from janus_export.reference.on_disk import free_bytes

LAYERS = 24
PER_LAYER, BESIDES = 0.8e9, 2.5e9  # bytes that all of them take together, measured at 24 layers: 19.8e9
STEADY = 0.9  # of the best read bandwidth: a round below it ran beside something else


def ratio(slow: Contestant, fast: Contestant, rounds: int) -> float:
    """Return the median ratio of slow to fast step times, over the rounds."""
    a, b = (np.median(np.reshape(one.times, (rounds, -1)), axis=1) for one in (slow, fast))
    return float(np.median(a / b))


def report(contestants: list[Contestant], rounds: int, cached: int, bandwidth: float) -> None:
    """Print the measurements and the targets; ``cached``: bytes of keys and values per position."""
    seen = {(one.who, one.context): one for one in contestants}

    def share(one: Contestant) -> float:
        return (one.weights + cached * one.context) / one.step / bandwidth

    print("| decoder | context | step, ms | backbone, ms | outside graphs | of bandwidth | eager / it |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in contestants:
        backbone = f"{median(one.backbones) * 1e3:.1f}" if one.backbones else ""
        outside = f"{median(one.outside):.1%}" if one.outside else ""
        eager = ratio(seen[EAGER, one.context], one, rounds)
        step = f"{one.step * 1e3:.1f} | {backbone} | {outside} | {share(one):.2f} | {eager:.2f}"
        print(f"| {one.who} | {one.context} | {step} |")
    print("\n| target | expected | at 64 | at 600 |\n| --- | ---: | ---: | ---: |")

    def faster(slow: str, fast: str) -> Callable[[int], float]:
        return lambda context: ratio(seen[slow, context], seen[fast, context], rounds)

    targets: list[tuple[str, str, Callable[[int], float]]] = [
        ("int4, times as fast as generate", ">= 7", faster(EAGER, INT4)),
        ("int4, times as fast as genai", ">= 1.2", faster(GENAI, INT4)),
        ("int4, head too, times as fast as genai", ">= 1.2", faster(GENAI, HEAD)),
        ("int4, head too, blocks of 128, times as fast as genai", ">= 1.2", faster(GENAI, LARGE)),
        ("fp32, times as fast as generate", ">= 2.4", faster(EAGER, FP32)),
        ("fp32, share of the read bandwidth", ">= 0.9", lambda context: share(seen[FP32, context])),
        (f"int4, capacity {CAPACITIES[1]} over capacity {CAPACITIES[0]}", "<= 1.15", faster(WIDE, INT4)),
        ("int4, share outside of graphs", "< 0.03", lambda context: median(seen[INT4, context].outside)),
    ]
    for target, goal, reached in targets:
        print(f"| {target} | {goal} | {reached(64):.3g} | {reached(600):.3g} |")


def affordable_layers() -> int:
    """Return how many layers fit into the memory that is free now, 24 at most.

    Raises:
        SystemExit: not even one fits.
    """
    free = free_bytes()
    layers = LAYERS if free is None else min(LAYERS, int((free - BESIDES) / PER_LAYER))
    if layers < 1:
        raise SystemExit(
            f"{(free or 0) / 1e9:.1f} GB of memory are free; one layer takes {(BESIDES + PER_LAYER) / 1e9}"
        )
    return layers


def run_rounds(contestants: list[Contestant], rounds: int, steps: int, threads: int) -> tuple[float, int]:
    """Time ``rounds`` rounds after one to warm up; return the read bandwidth and how many were repeated.

    A round at whose start or end memory was read at less than `STEADY` of the best bandwidth so far is
    repeated; at most ``rounds`` are.
    """
    watch, bandwidths = Stopwatch(), [read_bandwidth(threads)]
    done, repeated, is_warm = 0, 0, False
    while done < rounds:
        counts = [contestant.timings() for contestant in contestants]
        for contestant in contestants:
            time.sleep(0.3)  # until idle threads have stopped spinning, which would cost the next a core
            watch.watch(contestant, steps)
        bandwidths.append(read_bandwidth(threads))
        is_disturbed = min(bandwidths[-2:]) < STEADY * max(bandwidths) and repeated < rounds
        if is_warm and not is_disturbed:
            done += 1
            continue
        repeated += is_warm
        is_warm = True
        for contestant, count in zip(contestants, counts, strict=True):
            contestant.forget(count)
    return median(bandwidths), repeated


def main() -> None:
    """Build, run, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, help="default: 24, or what fits into free memory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=1, help="drawn at once; each takes two rows")
    parser.add_argument("--keep", type=Path, help="a folder for the models, used again the next time")
    arguments = parser.parse_args()
    layers = arguments.layers or affordable_layers()
    rows = 2 * arguments.images
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="decoder-") as temporary:
        folder = (arguments.keep or Path(temporary)) / f"{layers}-layers"
        folder.mkdir(parents=True, exist_ok=True)
        build(folder, layers)
        contestants = [
            *transformers_generate(folder / "llama", rows),
            *genai_generate(folder / "genai", rows, arguments.threads),
            *bundle_contestants(folder, arguments.images, arguments.threads),
        ]
        load = os.getloadavg()[0]
        bandwidth, repeated = run_rounds(contestants, arguments.rounds, arguments.steps, arguments.threads)
    names = ("torch", "transformers", "onnxruntime", "onnxruntime-genai")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    print(f"{processor_name()}, {os.cpu_count()} cores, load {load:.1f}, {arguments.threads} threads")
    print(f"{versions}; memory is read at {bandwidth / 1e9:.1f} GB/s")
    print(
        f"{layers} layers, {rows} rows, {arguments.rounds} rounds of {arguments.steps} steps, "
        f"{repeated} repeated because memory was read below {STEADY:.0%} of its best\n"
    )
    cached = rows * layers * 2 * SHAPE["hidden_size"] * 4
    report(contestants, arguments.rounds, cached, bandwidth)


if __name__ == "__main__":
    main()
