"""From a checkpoint to a bundle: lower the graphs, write the weights, bind the one to the other.

It all happens in a folder beside the bundle, which takes the bundle's place at the end. What is finished
there is kept when an export is interrupted, and used by the next one of the same source and settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from janus_export import manifest
from janus_export.bundle import LOCK, MANIFEST, is_bundle, write_manifest
from janus_export.errors import BundleError
from janus_export.graph_files import save_graph
from janus_export.graphs import Graph, declare
from janus_export.quantize import Outcome, quantize, stored
from janus_export.rounding import Rounding
from janus_export.settings import VARIANTS, ExportConfig
from janus_export.storage import Stored, sha256, write_stream
from janus_export.to_onnx import faked, to_onnx
from janus_export.unfinished import Unfinished
from janus_export.weights import FOLDER, Source, bind, detach, native_names, wanted
from janus_modular import Plugins, arguments
from janus_modular.atomic_writes import folder_lock, restore, swap
from janus_modular.checkpoints.merging import merged
from janus_modular.checkpoints.native import plugins_of
from janus_modular.checkpoints.opening import Opened, describe
from janus_modular.locking import locked
from janus_modular.plugins import default_plugins

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Tell = Callable[[str, int, int], None]
"""Hears what is being done, how much of it is done, and how much there is."""


def export(
    source: str | Path,
    target: str | Path,
    config: ExportConfig | None = None,
    *,
    plugins: Plugins | None = None,
    tell: Tell = lambda *_: None,
) -> Path:
    """Write a checkpoint as a bundle; return its folder. The model is never in memory.

    Adapters are folded into the weights that they adapt: a graph is as fast as one of a plain model.

    A bundle that stands there is replaced when the new one is complete, and not before.

    Raises:
        ExportError: a part of the model cannot become a graph, or the capacity is beyond its context.
        BundleError: something else stands there, another export is writing it, or the disk did not take it.
        CheckpointError: the source is no checkpoint, or damaged.
    """
    source, target = arguments.folder_path(source, "source"), arguments.folder_path(target, "target")
    expected = "an ExportConfig; resolve(load(...), ExportConfig) makes one of a mapping"
    config = arguments.option(config, "config", ExportConfig, type(None), expected=expected) or ExportConfig()
    folder = Path(target).expanduser().resolve()  # a link stays one, what it leads to is replaced
    aside = folder.with_name(f".{folder.name}.export")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, error=BundleError):
            restore(folder)
            _check_replaceable(folder)
            opened = merged(describe(source, plugins=plugins), plugins)
            config.ranges(opened.model.backbone.context)  # refuses what does not fit before it is begun
            aside.mkdir(exist_ok=True)
            _Export(str(source), opened, aside, config, tell, plugins).run()
            with _undisturbed(folder):
                swap(aside, folder)
    except OSError as error:
        raise BundleError(
            f"{folder} could not be written: {error}. What was there before is untouched; the same command"
            " goes on where this one stopped."
        ) from error
    return folder


def _undisturbed(folder: Path) -> AbstractContextManager[None]:
    """Wait until nobody notes a result in the bundle that is about to be replaced."""
    if not is_bundle(folder):
        return nullcontext()
    return locked(folder / LOCK, folder, wait=True, error=BundleError)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (is_bundle(folder) or (folder.is_dir() and not any(folder.iterdir()))):
        raise BundleError(f"{folder} exists and is no bundle, so it is not replaced. Choose another folder.")


class _Export:
    """One export at work in its folder."""

    def __init__(
        self,
        named: str,
        opened: Opened,
        aside: Path,
        config: ExportConfig,
        tell: Tell,
        plugins: Plugins | None,
    ) -> None:
        self.opened, self.config, self.tell = opened, config, tell
        self.plugins = plugins_of(opened.model, plugins or default_plugins())
        self.source = describe_source(named, opened)
        purpose = {"source": self.source, "config": asdict(config), "versions": manifest.versions()}
        self.unfinished = Unfinished(aside, purpose)
        self.aside, self.lowered = aside, aside / "lowered"
        self.names = native_names(opened.model)
        self.tensors = Source(opened.model, opened.tensors, str(opened.folder))
        self.roundings = {
            name: Rounding(
                name,
                VARIANTS[name].bits or 0,
                config.quantize.block_size,
                VARIANTS[name].form,
                config.quantize.accuracy_level,
            )
            for name in config.variants
            if VARIANTS[name].bits
        }

    def run(self) -> None:
        """Do all that is not done yet."""
        model = manifest.describe_model(self.opened.model, self.opened.processor)
        graphs = self._lower()
        files, outcomes = self._choose(graphs)
        weights = self._write_weights(files)
        uses = self._bind(files, weights)
        self.opened.processor.save(self.aside)
        shutil.rmtree(self.lowered)
        self.unfinished.close()
        variants = {
            name: {
                "dtype": str(DTYPES[VARIANTS[name].dtype]).removeprefix("torch."),
                "files": {graph.name: self._file(graph.name, name) for graph in graphs},
                "weights": sorted({w for graph in graphs for w in uses[self._file(graph.name, name)]}),
                "quantisation": manifest.describe_rounding(rounding, outcomes[name])
                if (rounding := self.roundings.get(name))
                else None,
            }
            for name in self.config.variants
        }
        write_manifest(
            self.aside,
            manifest.compose_manifest(
                source=self.source,
                plugins=self.plugins,
                model=model,
                graphs=graphs,
                variants=variants,
                files=self._hashes(),
            ),
        )

    def _lower(self) -> list[Graph]:
        """Write the graphs, without weights, of every dtype that is asked for; return those of the first."""
        dtypes = list(dict.fromkeys(VARIANTS[name].dtype for name in self.config.variants))
        self.lowered.mkdir(exist_ok=True)
        declared: list[Graph] = []
        for number, dtype in enumerate(dtypes):
            mode = faked(self.opened.model, DTYPES[dtype])
            with mode:
                graphs = self._declare()
            declared = declared or graphs
            for place, graph in enumerate(graphs, number * len(graphs)):
                self.tell("graphs", place, len(dtypes) * len(graphs))
                path = self.lowered / f"{graph.name}.{dtype}.onnx"
                if not self.unfinished.has(path):
                    lowered = to_onnx(graph, mode)
                    detach(lowered, self.names, dtype)
                    ir.save(lowered, path)
                    self.unfinished.note(path.name, sha256(path))
                self.tell("graphs", place + 1, len(dtypes) * len(graphs))
        return declared

    def _declare(self) -> list[Graph]:
        model = self.opened.model
        ranges = self.config.ranges(model.backbone.context)
        return declare(model, ranges, forbidden=self.opened.processor.forbidden)

    def _file(self, graph: str, variant: str) -> str:
        """Name a graph's file: variants share what they have in common."""
        own = variant in self.roundings and graph in self.config.quantize.graphs
        return f"{graph}.{variant if own else VARIANTS[variant].dtype}.onnx"

    def _choose(self, graphs: list[Graph]) -> tuple[dict[str, ir.Model], dict[str, dict[str, Outcome]]]:
        """Open the graphs by the names of their files in the bundle, and round where a variant rounds."""
        files: dict[str, ir.Model] = {}
        outcomes: dict[str, dict[str, Outcome]] = {}
        for variant in self.config.variants:
            for graph in graphs:
                name = self._file(graph.name, variant)
                if name in files:
                    continue
                files[name] = ir.load(self.lowered / f"{graph.name}.{VARIANTS[variant].dtype}.onnx")
                if name.endswith(f".{variant}.onnx") and variant in self.roundings:
                    outcome = quantize(files[name], self.roundings[variant])
                    outcomes.setdefault(variant, {})[graph.name] = outcome
        return files, outcomes

    def _write_weights(self, graphs: Mapping[str, ir.Model]) -> dict[str, Path]:
        """Write what the graphs point to, one file for each kind; return the files."""
        files = {}
        for kind, names in wanted(graphs.values()).items():
            tensors = self._stored(kind, names)
            contents = hashlib.sha256(repr([(one.name, one.shape) for one in tensors]).encode()).hexdigest()
            path = self.aside / FOLDER / self.unfinished.done.get(f"{kind} {contents}", "none")
            if not path.is_file():
                path = write_stream(tensors, self.aside / FOLDER, tell=partial(self.tell, f"weights {kind}"))
                self.unfinished.note(f"{kind} {contents}", path.name)
            files[kind] = path
        return files

    def _stored(self, kind: str, names: Iterable[str]) -> list[Stored]:
        if kind in DTYPES:
            return self.tensors.stored(names, DTYPES[kind])
        scale = np.float16 if VARIANTS[kind].dtype == "fp16" else np.float32
        return stored(sorted(names), self.tensors, self.roundings[kind], scale)

    def _bind(self, graphs: Mapping[str, ir.Model], weights: Mapping[str, Path]) -> dict[str, list[str]]:
        """Write the graphs into the root, pointing at their weights; return which each one uses."""
        uses = {}
        for name, graph in graphs.items():
            uses[name] = [f"{FOLDER}/{weights[kind].name}" for kind in wanted([graph])]
            save_graph(bind(graph, weights), self.aside / name)
        return uses

    def _hashes(self) -> dict[str, tuple[str, int]]:
        """Return hash and size of every file; those of weights are their names."""
        paths = [path for path in self.aside.rglob("*") if path.is_file() and path.name != MANIFEST]
        return {
            path.relative_to(self.aside).as_posix(): (
                path.stem if path.parent.name == FOLDER else sha256(path),
                path.stat().st_size,
            )
            for path in paths
        }


def describe_source(named: str, opened: Opened) -> dict[str, Any]:
    """Say which checkpoint this is; weight files by size and time, since hashing them takes a while."""
    text = (opened.folder / "config.json").read_bytes()
    return {
        "path": named,
        "layout": json.loads(text).get("model_type"),
        "config sha256": hashlib.sha256(text).hexdigest(),
        "files": _stamps(opened.folder),
    }


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Return size and time of change (ns) of a folder's files."""
    found: Iterable[Path] = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}
