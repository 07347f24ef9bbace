"""The read bandwidth of the processor, which `bench` compares the speed of a step with."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIZE = 1 << 30
"""Bytes that are read for one measurement: several times what the largest caches hold."""


def cores() -> int:
    """Count the cores that this process may use: the default number of threads of runtimes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_bandwidth(threads: int, *, passes: int = 3) -> float:
    """Measure how many bytes a second ``threads`` threads read from memory together.

    Each takes the maximum of a slice of one array, which numpy does in vector registers and without
    Python's lock: of the reductions that were tried, none reads faster. The best of several passes counts.
    """
    array = np.full(SIZE // 4, 1, np.uint32)  # written once, so that every page is allocated
    slices = np.array_split(array, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(1 + passes):  # the first one starts the threads
            start = time.perf_counter()
            list(pool.map(np.max, slices))
            seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds[1:])
