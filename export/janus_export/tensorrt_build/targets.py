"""Targets of engines: two packages with one API, and the GPUs that each of them knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from janus_export.errors import ExportError
from janus_export.runtimes.trt.device import compute_capability
from janus_modular.errors import MissingExtraError
from janus_modular.suggest import did_you_mean

CUDA = "cuda.bindings.runtime"


@dataclass(frozen=True)
class Target:
    """A TensorRT package."""

    name: str
    module: str  # its Python module
    extra: str  # the extra of janus-modular that installs it
    needs_gpu: bool  # builds only on a machine with the engine's GPU


TARGETS = {
    "tensorrt": Target("tensorrt", "tensorrt", "gpu", needs_gpu=True),
    "tensorrt-rtx": Target("tensorrt-rtx", "tensorrt_rtx", "rtx", needs_gpu=False),
}


def find_target(name: str) -> Target:
    """Return a target by its name.

    Raises:
        ExportError: no target has this name.
    """
    if name not in TARGETS:
        raise ExportError(
            f"there is no target '{name}'. {did_you_mean(name, TARGETS)}\nTargets: {', '.join(TARGETS)}"
        )
    return TARGETS[name]


def load(target: Target) -> Any:
    """Import a target's package, after the binding of CUDA that finds the GPU.

    Raises:
        MissingExtraError: one of the two packages is not installed; contains the pip command.
    """
    try:
        import_module(CUDA)
        return import_module(target.module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"building for {target.name}", target.extra) from error


def choose_architectures(target: Target, trt: Any, requested: Sequence[str]) -> list[str]:
    """Return the compute capabilities to build for: the requested ones, or the local GPU's.

    Raises:
        ExportError: there is no GPU and nothing was asked for, or the target does not build for it.
    """
    present = compute_capability()
    if target.needs_gpu:
        return [_present(target, present, requested)]
    known = buildable(trt)
    if not (chosen := list(requested or ([present] if present else []))):
        raise ExportError(f"this machine has no GPU; specify one: --sm 8.9, or any of {', '.join(known)}.")
    for capability in chosen:
        if capability not in known:
            raise ExportError(
                f"{target.name} {trt.__version__} does not build for compute capability {capability}. It"
                f" builds for: {', '.join(known)}.\nFor data centre GPUs (9.0, 10.0), use --target"
                " tensorrt on a machine with such a GPU."
            )
    return sorted(set(chosen), key=_number)


def buildable(trt: Any) -> list[str]:
    """Return the compute capabilities that a package builds for without a GPU of their kind."""
    names = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted((f"{name[:-1]}.{name[-1]}" for name in names), key=_number)


def _present(target: Target, present: str | None, requested: Sequence[str]) -> str:
    if present is None:
        raise ExportError(
            f"{target.name} builds on the GPU that will run the engine, and this machine has none. Run this"
            " on the machine with the GPU; --target tensorrt-rtx needs no GPU."
        )
    if different := [capability for capability in requested if capability != present]:
        raise ExportError(
            f"{target.name} builds only for the local GPU, of compute capability {present}, not for"
            f" {', '.join(different)}: omit --sm, or run this on a machine with such a GPU."
        )
    return present


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
