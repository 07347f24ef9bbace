"""CUDA graph capture stays valid if garbage collection frees memory during the capture."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from janus_export.runtimes.trt.cuda import Gpu, Memory


class Cycle:
    """Memory that only garbage collection releases."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.self = memory, self


def collect_in_a_thread() -> None:
    thread = threading.Thread(target=gc.collect)
    thread.start()
    thread.join()


@pytest.mark.parametrize("collect", [gc.collect, collect_in_a_thread])
@pytest.mark.parametrize("same", [True, False], ids=["own memory", "another session's memory"])
def test_a_capture_outlives_a_garbage_collection(machine: Any, same: bool, collect: Callable[[], None]):
    gpu = Gpu(0, extra="tensorrt")
    Cycle((gpu if same else Gpu(0, extra="tensorrt")).allocate(100))
    [block] = machine.blocks
    to = gpu.allocate(8)

    def record() -> None:
        gpu.copy_across(to.address, to.address, width=8)
        collect()
        assert block in machine.blocks, "released during the capture"

    graph = gpu.capture(record)
    assert block not in machine.blocks
    gpu.launch(graph)
    assert machine.counted("launch") == 1


def test_a_failed_capture_releases_what_was_postponed(machine: Any):
    gpu = Gpu(0, extra="tensorrt")
    Cycle(gpu.allocate(100))

    def fail() -> None:
        gc.collect()
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        gpu.capture(fail)
    assert not machine.blocks
