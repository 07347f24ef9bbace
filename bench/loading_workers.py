"""Images per second that threads and processes decode and scale, as `workers` of training does.

    python bench/loading_workers.py [--images 64] [--rounds 5]

The JPEG files have about one megapixel. The contestants alternate; `busy` counts threads beside a main thread
that holds Python's lock in short loops, as the trainer's own Python code does.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
from PIL import Image

from janus_modular.processing.image_io import open_image
from janus_modular.processing.image_transforms import generation_pixels

SIZE = (1024, 1024)


def jpeg(seed: int) -> bytes:
    """Return a file with detail of several sizes, which compresses as photos do: about 300 kB."""
    rng = np.random.default_rng(seed)
    layers = [
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        for side in (8, 64, 512)
    ]
    blended = Image.blend(Image.blend(layers[0], layers[1], 0.35), layers[2], 0.2)
    buffer = io.BytesIO()
    blended.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(file: bytes) -> np.ndarray:
    """Decode and scale an image as training does."""
    return generation_pixels(open_image(file), height=384, width=384)


def rate(run: Callable[[list[bytes]], None], files: list[bytes]) -> float:
    """Return images per second."""
    began = time.perf_counter()
    run(files)
    return len(files) / (time.perf_counter() - began)


def mapped(pool: Executor) -> Callable[[list[bytes]], None]:
    """Return a function that prepares files in a pool; results of processes are copied back."""

    def run(files: list[bytes]) -> None:
        for _ in pool.map(prepare, files):
            pass

    return run


def beside_python(run: Callable[[list[bytes]], None]) -> Callable[[list[bytes]], None]:
    """Return the function, run beside a thread that computes in Python alone."""

    def measured(files: list[bytes]) -> None:
        ended = threading.Event()

        def compute() -> None:
            while not ended.is_set():
                sum(range(1000))

        thread = threading.Thread(target=compute)
        thread.start()
        try:
            run(files)
        finally:
            ended.set()
            thread.join()

    return measured


def main() -> None:
    """Print the median rate of each contestant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    files = [jpeg(seed) for seed in range(arguments.images)]
    kilobytes = np.mean([*map(len, files)]) / 1e3
    print(f"{arguments.images} JPEG files of {SIZE[0]} x {SIZE[1]}, {kilobytes:.0f} kB each")
    context = multiprocessing.get_context("spawn")
    pools: list[tuple[str, Executor]] = [
        *((f"{n} thread{'s' * (n > 1)}", ThreadPoolExecutor(n)) for n in (1, 2)),
        *((f"{n} process{'es' * (n > 1)}", ProcessPoolExecutor(n, context)) for n in (1, 2)),
    ]
    runs = {"none": lambda files: [*map(prepare, files)]} | {name: mapped(pool) for name, pool in pools}
    runs |= {f"{name}, busy": beside_python(mapped(pool)) for name, pool in pools}
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(files[:4])  # starts the workers
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            rates[name].append(rate(run, files))
    for name, values in rates.items():
        print(f"{name:22} {statistics.median(values):6.1f} images/s")
    for _, pool in pools:
        pool.shutdown()


if __name__ == "__main__":
    main()
