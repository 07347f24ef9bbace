"""Throughput of training: floating-point operations a second, and their share of a device's peak (MFU).

MFU is model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): the operations that the model needs,
over those that the device could do in the same time. Padding, recomputed activations and waiting lower it.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable

import torch

from janus_modular.training.flops import FlopCounts
from janus_modular.training.processes import Processes
from janus_modular.training.step_batches import StepBatch

PEAK_TFLOPS: dict[str, float] = {
    r"B200": 2250, r"H200": 989.4, r"H100 PCIe": 756, r"H100 NVL": 835, r"H100": 989.4, r"H800": 989.4,
    r"A100": 312, r"A800": 312, r"L40S": 362, r"L40": 181, r"L4": 121, r"A10G": 70, r"A10": 125, r"A30": 165,
    r"A40": 149.7, r"RTX A6000": 154.8, r"RTX 4090": 165.2, r"RTX 3090": 71, r"MI300X": 1307.4,
    r"MI250X": 383,
}  # fmt: skip
"""Peaks of dense bfloat16 matrix products in 1e12 operations a second, from the makers' data sheets.

By words in a device's name; the first that fits counts. Of RTX cards, those that accumulate in float32.
"""


def peak_flops(device: torch.device, precision: torch.dtype | None, configured: float | None) -> float | None:
    """Return the peak of a device in operations a second: as configured, or known for bfloat16; else None."""
    if configured is not None:
        return configured
    if device.type != "cuda" or precision != torch.bfloat16:
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Return the peak of the GPU ``name`` with dense bfloat16 matrices; None if it is not in the table."""
    peaks = (peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}(?![A-Za-z0-9])", name))
    peak = next(peaks, None)
    return None if peak is None else peak * 1e12


def unknown_peak(device: torch.device, precision: torch.dtype | None) -> str:
    """Return the message that MFU is not reported."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    dtype = str(precision or torch.float32).removeprefix("torch.")
    return (
        f"MFU is not reported: the peak of '{name}' in {dtype} is not known. Set peak_flops, in operations a"
        " second of one device, to report it."
    )


class Throughput:
    """Adds up the operations of steps, and turns them into rates when metrics are logged."""

    def __init__(self, counts: FlopCounts, peak: float, processes: Processes) -> None:
        """Report for devices of ``peak`` operations a second, one for each of ``processes``."""
        self.counts = counts
        self.peak = peak
        self.processes = processes
        self.done: dict[str, float] = {}

    def counting(self, batches: Iterable[StepBatch]) -> Generator[StepBatch, None, None]:
        """Yield this process's batches, and add up what they need."""
        for batch in batches:
            for name, flops in self.counts.of_batches(batch.batches).items():
                self.done[name] = self.done.get(name, 0.0) + flops
            yield batch

    def rates(self, seconds: float) -> dict[str, float]:
        """Return the rates since the last call, as means over all processes, which all call this.

        ``mfu`` is the sum over all components ``mfu/NAME``, each of which is its operations over the time of
        the whole step. ``tflops_per_second`` is of one device.
        """
        of_ranks, self.done = self.processes.gather(self.done), {}
        names = sorted({name for done in of_ranks for name in done})
        scale = seconds * len(of_ranks)
        per_second = {name: sum(done.get(name, 0.0) for done in of_ranks) / scale for name in names}
        total = sum(per_second.values())
        rates = {f"mfu/{name}": rate / self.peak for name, rate in per_second.items()}
        return {**rates, "mfu": total / self.peak, "tflops_per_second": total / 1e12}
