"""Measures the speed of a model or a bundle: the rounds that are timed, and the results.

The registered samplers do the work, as they do for users. Imports no torch: a bundle is measured
without torch.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from janus_export.bench.bytes_read import cores, read_bandwidth
from janus_export.bench.modes import Mode, time_decoding
from janus_export.bundle.modes import MODES
from janus_export.process_memory import peak_memory
from janus_export.runtimes.contract import BundleRuntime, RunsOnDevice
from janus_modular import Janus, Message, Runtime, Text
from janus_modular.bundles import RUNTIME, find_bundle
from janus_modular.protocols import ModelRuntime

QUESTION = "What do you see when you look out of the window on a rainy day?"
IMAGE = "a lighthouse on a cliff above a stormy sea, at night, in the style of an old engraving"


def bench(
    path: str | Path,
    *,
    runtime: str | None = None,
    variant: str | None = None,
    allow_failed: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    tokens: int = 64,
    rounds: int = 3,
    batch_size: int = 1,
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a checkpoint or a bundle; return the numbers, as ``bench --json`` prints them.

    ``tokens``: steps that are timed in each mode; the time of a whole image is worked out from them.
    ``batch_size``: answers and images per batch. ``threads``: 0: the runtime's default.
    ``allow_failed``: a variant whose verification failed.
    """
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    on_progress("loading")
    start = time.perf_counter()
    janus = _open(path, runtime, variant, device, dtype, threads, allow_failed)
    modes = _modes(janus, tokens, batch_size)
    counters = {name: mode.warm_up() for name, mode in modes.items()}
    load = time.perf_counter() - start
    weights = {name: count() for name, count in counters.items()}
    threads = threads or cores()
    bandwidths, decoding, peak = list[float](), list[float](), None
    for number in range(1, rounds + 1):
        on_progress(f"round {number} of {rounds}")
        for mode in modes.values():
            mode.measure()
        if "drawing" in modes:
            decoding.append(time_decoding(janus.runtime, batch_size))
        peak = peak or peak_memory()  # before there is an array that is not the model's
        if _memory(janus.runtime) == "cpu":
            bandwidths.append(read_bandwidth(threads))
    bandwidth = median(bandwidths) if bandwidths else None
    results = {name: mode.speed(weights[name], bandwidth).to_dict() for name, mode in modes.items()}
    if "drawing" in modes:
        results["drawing"] |= _image(results["drawing"], janus.runtime, median(decoding), batch_size)
    return {
        "model": str(path),
        "machine": {"processor": processor_name(), "cores": cores(), "load_average": load_average},
        "ran": {
            **_how(janus.runtime, runtime),
            "threads": threads,
            "rounds": rounds,
            "batch_size": batch_size,
        },
        "load_s": load,
        "peak_memory_bytes": peak,
        "read_bandwidth_bytes_per_s": bandwidth,
        "text": results.get("text"),
        "drawing": results.get("drawing"),
    }


def _open(
    path: str | Path,
    runtime: str | None,
    variant: str | None,
    device: str,
    dtype: str,
    threads: int,
    allow_failed: bool,
) -> Janus:
    chosen: str | dict[str, Any] | None = runtime
    if threads and find_bundle(path):
        chosen = {"name": runtime or RUNTIME, "threads": threads}
    elif threads:
        import torch

        torch.set_num_threads(threads)
    return Janus.from_pretrained(
        path, device=device, dtype=dtype, runtime=chosen, variant=variant, allow_failed=allow_failed
    )


def _modes(janus: Janus, tokens: int, batch_size: int) -> dict[str, Mode]:
    """Prepare the modes text and drawing; for a bundle, only its modes."""
    processor, runtime = janus.processor, janus.runtime
    made_for = runtime.bundle.modes if isinstance(runtime, BundleRuntime) else MODES
    modes = dict[str, Mode]()
    if "text" in made_for:
        prompts = [processor.chat_prompt([Message("user", [Text(QUESTION)])])] * batch_size
        modes["text"] = Mode(
            janus,
            "text_samplers",
            runtime.text_sampler,
            prompts,
            tokens,
            positions=tokens + 1,
            max_tokens=tokens + 1,
        )
    if "drawing" in made_for and processor.drawing:
        prompts = [processor.draw_prompt(IMAGE)] * batch_size
        positions = processor.drawing.num_tokens
        modes["drawing"] = Mode(
            janus,
            "image_samplers",
            runtime.image_sampler,
            prompts,
            min(tokens, positions - 1),
            positions=positions,
        )
    return modes


def _image(drawing: dict[str, Any], runtime: Runtime, decoding: float, images: int) -> dict[str, Any]:
    """Add the time of a whole image: its first position, one step for each other position, and decoding."""
    positions = runtime.open(1).image_positions
    whole = drawing["first_s"] + (positions - 1) * drawing["step_s"] + decoding
    return {"positions": positions, "decode_s": decoding, "image_s": whole / images}


def _memory(runtime: Runtime) -> str | None:
    """Return the device that a runtime's tensors are on: cpu, cuda, ..."""
    if isinstance(runtime, ModelRuntime):
        return next(runtime.model.parameters()).device.type
    return runtime.device.memory if isinstance(runtime, RunsOnDevice) else None


def _how(runtime: Runtime, name: str | None) -> dict[str, Any]:
    """Return what ran, and in which dtype."""
    if isinstance(runtime, ModelRuntime):
        weight = next(runtime.model.backbone.parameters())  # type: ignore[attr-defined]  # a module
        return {
            "runtime": f"torch {metadata.version('torch')}",
            "variant": None,
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
        }
    variant = dtype = None
    if isinstance(runtime, BundleRuntime):
        variant = runtime.variant
        dtype = runtime.bundle.manifest["variants"][variant]["dtype"]
    device = runtime.device.name if isinstance(runtime, RunsOnDevice) else None
    return {"runtime": name or RUNTIME, "variant": variant, "device": device, "dtype": dtype}


def processor_name() -> str:
    """Name the processor, as the system does."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()
