"""Builds engines: each graph of a variant is lowered and built, unless its engine exists already.

Engines are in ``engines/<variant>.<target>.<arch>/`` of the bundle. Each is written under a temporary name,
renamed, and then recorded in the manifest. A new export replaces the bundle, including its engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from janus_export.bundle.bundle import Bundle, load_bundle
from janus_export.bundle.engines import key_of
from janus_export.bundle.manifest_graphs import axes_of
from janus_export.errors import BundleError, ExportError
from janus_export.runtimes.trt.device import compute_capability
from janus_export.tensorrt_build.builder import EngineOptions, build_engine, inspect_engine
from janus_export.tensorrt_build.lowering import lower
from janus_export.tensorrt_build.profiles import Lengths, profiles
from janus_export.tensorrt_build.targets import choose_architectures, find_target, load
from janus_modular import __version__
from janus_modular.atomic_writes import atomic_replace, folder_lock, write_text
from janus_modular.foreign import sha256
from janus_modular.suggest import did_you_mean

FOLDER = "engines"


@dataclass(frozen=True)
class BuildConfig:
    """Options of `build`."""

    target: str  # tensorrt or tensorrt-rtx
    variant: str | None = None  # None: the bundle's first
    sm: Sequence[str] = ()  # compute capabilities, such as 8.9; empty: that of the local GPU
    capacity: int | None = None  # length of the KV cache, in positions; None: the bundle's typical capacity
    rows: int | None = None  # maximum batch rows; None: the bundle's maximum
    graphs: Sequence[str] = ()  # names of graphs; empty: all
    weight_streaming: bool = False  # allow weights to stay in host memory, as TensorRT's flag of this name
    timing_cache: Path | None = None  # file of kernel timings, which is read and written; None: no file
    force: bool = False  # rebuild existing engines


OnProgress = Callable[[str, int, int], None]
"""Called with the name of the graph that is being built, the graphs done, and the graphs in all."""


def build(
    folder: str | Path, config: BuildConfig, *, on_progress: OnProgress = lambda *_: None
) -> tuple[str, list[str]]:
    """Build the engines of a variant; return (their key in the manifest, names of the graphs built now).

    Engines that exist with the same graph and options are kept.

    Raises:
        ExportError: the bundle or TensorRT does not support the target, a GPU or a length, or a graph cannot
            be built.
        BundleError: the bundle is damaged, or an engine cannot be written.
        MissingExtraError: the target's package is not installed.
    """
    return _Build(load_bundle(folder), config, on_progress).run()


class _Build:
    """A running build of one variant's engines."""

    def __init__(self, bundle: Bundle, config: BuildConfig, on_progress: OnProgress) -> None:
        self.bundle, self.config, self.on_progress = bundle, config, on_progress
        self.target = find_target(config.target)
        self.variant = choose_variant(bundle, config.variant)
        self.files: Mapping[str, str] = bundle.manifest["variants"][self.variant]["files"]
        for name in config.graphs:
            if name not in self.files:
                hint = did_you_mean(name, self.files)
                raise ExportError(f"no graph is called '{name}'. {hint}\nGraphs: {', '.join(self.files)}")
        self._refuse_native_sizes()
        self.lengths = Lengths.choose(bundle.manifest["axes"], config.rows, config.capacity)
        self.trt = load(self.target)
        self.arch = choose_architectures(self.target, self.trt, config.sm)
        self.capability_here = compute_capability()
        if config.timing_cache is not None and self.capability_here is None:
            raise ExportError(
                "--timing-cache records measurements on a GPU, and this machine has none: omit it."
            )
        self.key = key_of(self.variant, self.target.name, self.arch)
        self.folder = bundle.folder / FOLDER / self.key

    def _refuse_native_sizes(self) -> None:
        """Raise ExportError for a graph that reads images in sizes of their own."""
        for name in self.config.graphs or self.files:
            if "image_rows" in axes_of([self.bundle.manifest["graphs"][name]]):
                raise ExportError(
                    f"{name}: it reads images in native sizes (pixels.resize=native); expected one size, as"
                    " an engine takes the memory of the tallest and the widest image in one. Build a bundle"
                    " of other modes (export --only text --only drawing), or run this one in ONNX Runtime."
                )

    def run(self) -> tuple[str, list[str]]:
        """Build the missing engines, with their folder locked."""
        try:
            self.folder.parent.mkdir(exist_ok=True)
            with folder_lock(self.folder, error=BundleError):
                return self._run()
        except OSError as error:
            raise BundleError(
                f"an engine could not be written into {self.folder}: {error}. Finished engines are kept;"
                " the same command continues from there."
            ) from error

    def _run(self) -> tuple[str, list[str]]:
        self.bundle = load_bundle(self.bundle.folder)  # another build may have changed it
        before = self.bundle.manifest.get("built", {}).get(self.key, {})
        engines = {
            graph: record
            for graph, record in before.get("engines", {}).items()
            if self._is_current(graph, record)
        }
        requested = [graph for graph in self.files if not self.config.graphs or graph in self.config.graphs]
        missing = [graph for graph in requested if self.config.force or graph not in engines]
        if missing:
            self.bundle.verify_weights(self.bundle.manifest["variants"][self.variant]["weights"])
        executed = before.get("executed", False) and not missing
        if engines != before.get("engines", {}):
            self._record(engines, executed)  # before their files are removed
        self._clear(engines)
        for index, graph in enumerate(missing):
            self.on_progress(graph, index, len(missing))
            engines[graph] = self._build(graph)
            self._record(engines, executed)
            self.on_progress(graph, index + 1, len(missing))
        inspected = [graph for graph, record in engines.items() if self._inspect(graph, record)]
        if inspected:
            self._record(engines, executed)
        return self.key, missing

    def _build(self, graph: str) -> dict[str, Any]:
        source = self.bundle.path(graph, self.variant)
        file = self._file(graph)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._inspection(graph).unlink(missing_ok=True)  # of an older engine
        with atomic_replace(file, error=BundleError) as temporary:
            built = build_engine(
                self.trt, lower(source, capacity=self.lengths.capacity), source, temporary, self._order(graph)
            )
        return {
            "file": file.relative_to(self.bundle.folder).as_posix(),
            "sha256": built.sha256,
            "bytes": built.bytes,
            "seconds": built.seconds,
            "peak_bytes": built.peak_bytes,
            "inspector": None,
            "profiles": self._profiles(graph),
            "source": self._source(graph),
            "recipe": self._recipe(graph),
        }

    def _order(self, graph: str) -> EngineOptions:
        return EngineOptions(
            () if self.target.needs_gpu else self.arch,
            profiles(self.bundle.manifest, graph, self.lengths),
            self.config.weight_streaming,
            self.config.timing_cache,
        )

    def _inspect(self, graph: str, engine: dict[str, Any]) -> bool:
        """Write TensorRT's inspection beside an engine if its GPU is available; return True if written."""
        if engine["inspector"] is not None or self.capability_here not in self.arch:
            return False
        path = self._inspection(graph)
        write_text(path, inspect_engine(self.trt, self._file(graph)))
        engine["inspector"] = path.relative_to(self.bundle.folder).as_posix()
        return True

    def _record(self, engines: Mapping[str, Any], executed: bool) -> None:
        self.bundle.record(
            "built",
            self.key,
            {
                "variant": self.variant,
                "target": self.target.name,
                "arch": self.arch,
                "builder": self.trt.__version__,
                "capacity": self.lengths.capacity,
                "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
                "options": {"rows": self.lengths.rows, "weight_streaming": self.config.weight_streaming},
                "executed": executed,
                "engines": {graph: engines[graph] for graph in self.files if graph in engines},
            },
        )

    def _is_current(self, graph: str, engine: Mapping[str, Any]) -> bool:
        """Return True if an engine is intact and up to date."""
        file = self._file(graph)
        return (
            graph in self.files
            and engine.get("recipe") == self._recipe(graph)
            and file.is_file()
            and sha256(file) == engine["sha256"]
        )

    def _clear(self, engines: Mapping[str, Any]) -> None:
        """Remove outdated engines, and files of an interrupted build."""
        kept = {path for graph in engines for path in (self._file(graph), self._inspection(graph))}
        for path in self.folder.glob("*"):
            if path not in kept and path.is_file():
                path.unlink()

    def _recipe(self, graph: str) -> str:
        """Hash everything that an engine depends on; a graph refers to its weights by hash."""
        order = asdict(self._order(graph)) | {"timing_cache": None}
        made_by = [self.target.name, self.trt.__version__, __version__]
        text = json.dumps([self._source(graph), order, self.arch, made_by], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _profiles(self, graph: str) -> list[dict[str, Any]]:
        return [
            {"name": profile.name, "axes": {name: list(lengths) for name, lengths in profile.axes.items()}}
            for profile in profiles(self.bundle.manifest, graph, self.lengths)
        ]

    def _source(self, graph: str) -> str:
        return str(self.bundle.manifest["sha256"][self.files[graph]])

    def _file(self, graph: str) -> Path:
        return self.folder / f"{graph}.engine"

    def _inspection(self, graph: str) -> Path:
        return self.folder / f"{graph}.json"


def choose_variant(bundle: Bundle, requested: str | None) -> str:
    """Return the variant to build.

    Raises:
        BundleError: the bundle has no such variant.
        ExportError: the variant is for ONNX Runtime only.
    """
    variant = requested or bundle.variants[0]
    bundle.path("backbone", variant)
    quantization = bundle.manifest["variants"][variant]["quantization"]
    if quantization and quantization["form"] == "nbits":
        hint = "trt-int4" if quantization["bits"] == 4 else "fp16"
        usable = [name for name, record in bundle.manifest["variants"].items() if _takes(record)]
        raise ExportError(
            f"{variant} is for ONNX Runtime on a CPU: TensorRT does not support its operator, MatMulNBits."
            f" In this bundle, TensorRT supports: {', '.join(usable) or 'none'}.\nThe variant nearest to"
            f" {quantization['bits']} bits: janus-modular export MODEL BUNDLE --precision {hint}"
        )
    return variant


def _takes(variant: Mapping[str, Any]) -> bool:
    return (variant["quantization"] or {}).get("form") != "nbits"
