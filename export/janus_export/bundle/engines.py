"""Finds and checks the engines that `janus-modular build` wrote into a bundle, without torch or TensorRT.

A set holds the engines of one variant for one target and one or more architectures of GPUs; the manifest
keeps it in ``built``, under a key such as "fp16.tensorrt-rtx.sm89". Engines have the same inputs and
outputs as their ONNX graphs: `Bundle.contract`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_export.bundle.bundle import Bundle, inside
from janus_export.errors import BundleError
from janus_modular.foreign import sha256

BUILD = "Build it with: janus-modular build {folder} --target {target} --precision {variant}"


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: the ranges of lengths that an engine accepts."""

    name: str  # "prefill" and "decode" of the backbone; other graphs have only "default"
    axes: Mapping[str, tuple[int, int, int]]  # axis -> minimum, typical, maximum

    def holds(self, axes: Mapping[str, int]) -> bool:
        """Return True if lengths are within the profile."""
        return all(low <= axes[name] <= high for name, (low, _, high) in self.axes.items() if name in axes)


@dataclass(frozen=True)
class Engine:
    """The manifest's entry of an engine."""

    file: str  # in the bundle
    sha256: str
    source: str  # hash of the graph that it was built from
    profiles: tuple[Profile, ...]  # in the order of TensorRT's profile indices


@dataclass(frozen=True)
class EngineSet:
    """The engines of a variant; a file is checked when its path is requested."""

    folder: Path
    key: str  # its key in the manifest's ``built``
    variant: str
    target: str
    arch: list[str]  # compute capabilities: ["8.9"]
    builder: str  # version of the TensorRT package that built them
    capacity: int  # capacity of the KV cache, in positions
    executed: bool  # whether a GPU has run them
    engines: Mapping[str, Engine]  # by graph

    def path(self, graph: str) -> Path:
        """Return the path of an engine, after its hash was checked.

        Raises:
            BundleError: the graph has no engine, or its file is missing, changed, or outside of the bundle.
        """
        hint = BUILD.format(folder=self.folder, target=self.target, variant=self.variant)
        hint += "".join(
            f" --sm {capability}" for capability in self.arch
        )  # for the GPUs of this set, not for the local GPU
        if graph not in self.engines:
            raise BundleError(
                f"{self.folder} has no engine of '{graph}' in {self.key}. It has:"
                f" {', '.join(self.engines) or 'none'}.\n{hint}"
            )
        engine = self.engines[graph]
        path = inside(self.folder, engine.file)
        if not path.is_file():
            raise BundleError(f"{self.folder} lacks {engine.file}.\n{hint}")
        if sha256(path) != engine.sha256:
            raise BundleError(f"{path} has changed: its hash differs.\n{hint}")
        return path


def key_of(variant: str, target: str, arch: Sequence[str]) -> str:
    """Return the key of a set of engines: in the manifest, and as a folder below ``engines/``."""
    return f"{variant}.{target}.{'-'.join('sm' + capability.replace('.', '') for capability in arch)}"


def find_engines(bundle: Bundle, variant: str, target: str, arch: str | None = None) -> EngineSet:
    """Find the engines of a variant for a target, and for a GPU of this compute capability ("8.9").

    Without ``arch`` there must be exactly one set. Of several sets for a GPU, the one with the most graphs
    is taken; of those, the one for the fewest compute capabilities. Files are not checked yet.

    Raises:
        BundleError: there is no such set, several, or one that was built from other graphs.
    """
    sets = {
        name: engines
        for name, engines in read_engines(bundle).items()
        if (engines.variant, engines.target) == (variant, target)
    }
    available = ", ".join(sets) or ", ".join(bundle.manifest.get("built", {})) or "none"
    matching = [engines for engines in sets.values() if arch is None or arch in engines.arch]
    hint = BUILD.format(folder=bundle.folder, target=target, variant=variant)
    if not matching:
        on = f" for a GPU of compute capability {arch}" if arch else ""
        raise BundleError(
            f"{bundle.folder} has no {target} engines of {variant}{on}. Built: {available}.\n{hint}"
        )
    if len(matching) > 1 and arch is None:
        raise BundleError(f"{bundle.folder} has several sets of such engines: {available}. Specify the GPU.")
    files, hashes = bundle.manifest["variants"].get(variant, {}).get("files", {}), bundle.manifest["sha256"]
    best = max(matching, key=lambda engines: (len(engines.engines), -len(engines.arch)))
    for graph, engine in best.engines.items():
        if engine.source != hashes.get(files.get(graph)):
            raise BundleError(f"the engine of '{graph}' in {best.key} was built from another graph.\n{hint}")
    return best


def read_engines(bundle: Bundle) -> dict[str, EngineSet]:
    """Return all sets of engines in the manifest, by key.

    Raises:
        BundleError: the manifest's entries on engines are malformed.
    """
    try:
        return {
            key: _read(bundle.folder, key, record) for key, record in bundle.manifest.get("built", {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"the entries on engines in the manifest of {bundle.folder} are malformed: {error!r}.\n"
            + BUILD.format(folder=bundle.folder, target="TARGET", variant="VARIANT")
        ) from error


def _read(folder: Path, key: str, record: Mapping[str, Any]) -> EngineSet:
    engines = {
        graph: Engine(
            engine["file"],
            engine["sha256"],
            engine["source"],
            tuple(Profile(profile["name"], _axes(profile["axes"])) for profile in engine["profiles"]),
        )
        for graph, engine in record["engines"].items()
    }
    return EngineSet(
        folder,
        key,
        record["variant"],
        record["target"],
        list(record["arch"]),
        record["builder"],
        record["capacity"],
        record["executed"],
        engines,
    )


def _axes(axes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int, int]]:
    return {name: (low, typical, high) for name, (low, typical, high) in axes.items()}
