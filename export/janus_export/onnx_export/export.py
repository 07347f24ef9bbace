"""Exports a checkpoint as a bundle: lowers the graphs, writes the weights, and binds the graphs to them.

An export works in a temporary folder beside the bundle, and replaces the bundle at the end. After an
interruption, the next export with the same source and settings uses the files that are finished.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from janus_export.bundle.bundle import LOCK, MANIFEST, is_bundle, write_manifest
from janus_export.bundle.files import Stored, split, write_stream
from janus_export.bundle.sizes import parse_bytes
from janus_export.bundle.source import describe_source
from janus_export.config import VARIANTS, ExportConfig
from janus_export.errors import BundleError, ExportError
from janus_export.onnx_export import manifest
from janus_export.onnx_export.graph_files import save_graph
from janus_export.onnx_export.graphs import Graph, declare
from janus_export.onnx_export.half_storage import store_as_half
from janus_export.onnx_export.quantization import QuantizationSpec
from janus_export.onnx_export.quantize import Outcome, quantize, stored
from janus_export.onnx_export.resume import ExportState
from janus_export.onnx_export.trace import faked, to_onnx
from janus_export.onnx_export.weights import (
    FOLDER,
    Pointer,
    Source,
    bind,
    detach,
    group_by_users,
    native_names,
    pointers,
)
from janus_modular import Plugins, arguments
from janus_modular.atomic_writes import folder_lock, restore, swap
from janus_modular.checkpoints.merging import merge_adapters
from janus_modular.checkpoints.native import plugins_of
from janus_modular.checkpoints.opening import LazyCheckpoint, open_lazily
from janus_modular.foreign import sha256
from janus_modular.locking import locked
from janus_modular.plugins import default_plugins
from janus_modular.plugins.lock import carry_lock
from janus_modular.samplers import unusable_samplers
from janus_modular.suggest import did_you_mean

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Files = dict[str, dict[str, str]]
"""Variant, graph -> the name of its file."""

OnProgress = Callable[[str, int, int], None]
"""Called with the name of the current task, the amount done, and the total."""


def export(
    source: str | Path,
    target: str | Path,
    config: ExportConfig | None = None,
    *,
    plugins: Plugins | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> Path:
    """Export a checkpoint (a folder or hub id) to the bundle ``target``; return the bundle's folder.

    Weights are converted one tensor at a time; LoRA adapters are merged. A bundle in ``target`` is replaced
    when the new one is complete. After an interruption, the same call continues.
    ``config``: variants, modes, sizes; default: `ExportConfig()`.

    Raises:
        ExportError: a component or a sampler cannot be exported, or the capacity exceeds the model's context.
        BundleError: ``target`` contains other files, is written by another export, or cannot be written.
        CheckpointError: the source is not a checkpoint, or is damaged.
    """
    source, target = arguments.folder_path(source, "source"), arguments.folder_path(target, "target")
    expected = "an ExportConfig; resolve(load(...), ExportConfig) makes one of a mapping"
    config = arguments.option(config, "config", ExportConfig, type(None), expected=expected) or ExportConfig()
    folder = Path(target).expanduser().resolve()  # a link is kept, its target is replaced
    temporary = folder.with_name(f".{folder.name}.export")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, error=BundleError):
            restore(folder)
            _check_replaceable(folder)
            opened = merge_adapters(open_lazily(source, plugins=plugins), plugins)
            _check_samplers(opened, plugins or default_plugins())
            config.ranges(opened.model.backbone.context)  # invalid settings fail before the export starts
            temporary.mkdir(exist_ok=True)
            _Export(str(source), opened, temporary, config, on_progress, plugins).run()
            carry_lock(folder, temporary, plugins or default_plugins())
            with _undisturbed(folder):
                swap(temporary, folder)
    except OSError as error:
        raise BundleError(
            f"{folder} could not be written: {error}. Existing files are unchanged; the same command"
            " continues where this one stopped."
        ) from error
    return folder


def _check_samplers(opened: LazyCheckpoint, plugins: Plugins) -> None:
    """Check that the samplers that a checkpoint names are available: without them, no bundle can be verified.

    Raises:
        ExportError: a sampler is not available; says why.
    """
    unusable = unusable_samplers(opened.model, plugins.as_recorded(opened.provenance.plugins))
    if unusable:
        reasons = "\n".join(f"  {command}: {reason}" for command, reason in unusable.items())
        raise ExportError(
            f"{opened.folder}: its samplers cannot be used:\n{reasons}\nInstall their plugin, or name others:"
            f" janus-modular convert {opened.folder} FOLDER text_sampler=... image_sampler=..."
        )


def _undisturbed(folder: Path) -> AbstractContextManager[None]:
    """Wait until no process records a result in the bundle that will be replaced."""
    if not is_bundle(folder):
        return nullcontext()
    return locked(folder / LOCK, folder, wait=True, error=BundleError)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not (is_bundle(folder) or (folder.is_dir() and not any(folder.iterdir()))):
        raise BundleError(f"{folder} exists and is no bundle, so it is not replaced. Choose another folder.")


class _Export:
    """A running export, in its temporary folder."""

    def __init__(
        self,
        named: str,
        opened: LazyCheckpoint,
        temporary: Path,
        config: ExportConfig,
        on_progress: OnProgress,
        plugins: Plugins | None,
    ) -> None:
        self.opened, self.config, self.on_progress = opened, config, on_progress
        self.plugins = plugins_of(opened, plugins or default_plugins())
        self.source = describe_source(named, opened.folder)
        fingerprint = {"source": self.source, "config": asdict(config), "versions": manifest.versions()}
        self.state = ExportState(temporary, fingerprint)
        self.temporary, self.lowered = temporary, temporary / "lowered"
        self.names = native_names(opened.model)
        self.tensors = Source(opened.model, opened.tensors, str(opened.folder))
        self.quantizations = {
            name: QuantizationSpec(
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
        """Run all remaining steps."""
        model = manifest.describe_model(self.opened.model, self.opened.processor)
        graphs = self._lower()
        lowered, files, outcomes = self._choose(graphs)
        weights = self._write_weights(lowered, outcomes)
        uses = self._bind(lowered, weights)
        self.opened.processor.save(self.temporary)
        shutil.rmtree(self.lowered)
        self.state.close()
        variants = {
            name: {
                "dtype": str(DTYPES[VARIANTS[name].dtype]).removeprefix("torch."),
                "files": files[name],
                "weights": sorted({path for file in files[name].values() for path in uses[file]}),
                "storage": str(DTYPES[self.config.stored_as(name)]).removeprefix("torch."),
                "quantization": manifest.describe_quantization(quantization, outcomes[name])
                if (quantization := self.quantizations.get(name))
                else None,
            }
            for name in self.config.variants
        }
        write_manifest(
            self.temporary,
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
        """Write the graphs, without weights, of every requested dtype; return those of the first dtype."""
        dtypes = list(dict.fromkeys(VARIANTS[name].dtype for name in self.config.variants))
        self.lowered.mkdir(exist_ok=True)
        declared: list[Graph] = []
        for number, dtype in enumerate(dtypes):
            mode = faked(self.opened.model, DTYPES[dtype])
            with mode:
                graphs = self._declare(self.config.lowered_beside)
            declared = declared or graphs
            for index, graph in enumerate(graphs, number * len(graphs)):
                self.on_progress("graphs", index, len(dtypes) * len(graphs))
                path = self.lowered / f"{graph.name}.{dtype}.onnx"
                if not self.state.has(path):
                    lowered = to_onnx(graph, mode)
                    detach(lowered, self.names, dtype)
                    ir.save(lowered, path)
                    self.state.note(path.name, sha256(path))
                self.on_progress("graphs", index + 1, len(dtypes) * len(graphs))
        return [graph for graph in declared if graph.name not in self.config.lowered_beside]

    def _declare(self, beside: Container[str]) -> list[Graph]:
        model = self.opened.model
        ranges = self.config.ranges(model.backbone.context)
        graphs = declare(model, ranges, suppressed_ids=self.opened.processor.suppressed_ids)
        self._check_names([graph.name for graph in graphs])
        return [graph for graph in graphs if self.config.exports(graph.name) or graph.name in beside]

    def _check_names(self, known: Sequence[str]) -> None:
        """Raise ExportError if the settings name a graph that the model does not have."""
        quantize = self.config.quantize
        for key, names in (("graphs", quantize.graphs or ()), ("bits", quantize.bits)):
            for name in names:
                if name not in known:
                    hint = did_you_mean(name, known)
                    raise ExportError(
                        f"quantize.{key}: no graph is called '{name}'. {hint} Graphs: {', '.join(known)}"
                    )

    def _choose(self, graphs: list[Graph]) -> tuple[dict[str, ir.Model], Files, dict[str, Outcome]]:
        """Open the graphs by their file names in the bundle; quantise them for variants that are quantised.

        Variants of one dtype share the file of a graph that they do not quantise.
        """
        models: dict[str, ir.Model] = {}
        files: Files = {}
        outcomes: dict[str, Outcome] = {}
        for variant in self.config.variants:
            dtype, storage = VARIANTS[variant].dtype, self.config.stored_as(variant)
            opened = {graph.name: ir.load(self.lowered / f"{graph.name}.{dtype}.onnx") for graph in graphs}
            changed = set[str]()
            if variant in self.quantizations:
                beside = {
                    name: ir.load(self.lowered / f"{name}.{dtype}.onnx")
                    for name in self.config.lowered_beside
                }
                bits = self.config.bits(variant)
                outcomes[variant] = quantize(opened, self.quantizations[variant], bits, beside)
                changed = outcomes[variant].changed
            if storage != dtype:
                changed = set(opened)
                for lowered in opened.values():
                    store_as_half(lowered, {dtype: storage})
            files[variant] = {name: f"{name}.{variant if name in changed else dtype}.onnx" for name in opened}
            models |= {files[variant][name]: lowered for name, lowered in opened.items()}
        self._refuse_idle(outcomes)
        return models, files, outcomes

    def _refuse_idle(self, outcomes: Mapping[str, Outcome]) -> None:
        """Raise an error for a graph in the settings in which no variant quantises any weight."""
        named = self.config.quantize.graphs or ()
        idle = [
            name
            for name in named
            if outcomes and all(name in outcome.without for outcome in outcomes.values())
        ]
        if idle:
            reasons = sorted(
                {why for outcome in outcomes.values() for name in idle for why in outcome.without[name]}
            )
            raise ExportError(
                f"quantize.graphs names {', '.join(idle)}, in which {', '.join(outcomes)} can quantise"
                f" nothing: {'; '.join(reasons)}. Leave it out."
            )

    def _write_weights(
        self, graphs: Mapping[str, ir.Model], outcomes: Mapping[str, Outcome]
    ) -> dict[Pointer, Path]:
        """Write the weights, a file for each set of graphs that share them; return their locations."""
        limit = self.config.max_file_size
        groups = []
        for (weight_set, _), names in group_by_users(graphs).items():
            tensors = self._stored(weight_set, names, outcomes)
            try:
                files = split(tensors, parse_bytes(limit) if limit else None)
            except ValueError as error:
                raise ExportError(
                    f"max_file_size: {limit} is too small: {error}. Tensors cannot be split: raise it."
                ) from error
            groups += [(weight_set, file) for file in files]
        total, done = sum(tensor.size for _, tensors in groups for tensor in tensors), 0

        def on_progress(written: int, _: int) -> None:
            self.on_progress("weights", done + written, total)

        where: dict[Pointer, Path] = {}
        for weight_set, tensors in groups:
            contents = hashlib.sha256(
                repr([(tensor.name, tensor.shape) for tensor in tensors]).encode()
            ).hexdigest()
            path = self.temporary / FOLDER / self.state.done.get(f"{weight_set} {contents}", "none")
            if not path.is_file():
                path = write_stream(tensors, self.temporary / FOLDER, on_progress=on_progress)
                self.state.note(f"{weight_set} {contents}", path.name)
            done += sum(tensor.size for tensor in tensors)
            where |= {(weight_set, tensor.name): path for tensor in tensors}
        return where

    def _stored(self, weight_set: str, names: Iterable[str], outcomes: Mapping[str, Outcome]) -> list[Stored]:
        if weight_set in DTYPES:
            return self.tensors.stored(names, DTYPES[weight_set])
        scale = np.float16 if self.config.stored_as(weight_set) == "fp16" else np.float32
        quantization = self.quantizations[weight_set]
        bits = {name: replace(quantization, bits=n) for name, n in outcomes[weight_set].quantized.items()}
        return stored(sorted(names), self.tensors, bits, scale)

    def _bind(self, graphs: Mapping[str, ir.Model], weights: Mapping[Pointer, Path]) -> dict[str, set[str]]:
        """Write the graphs into the root, pointing at their weights; return which files each one uses."""
        uses = {}
        for name, graph in graphs.items():
            uses[name] = {f"{FOLDER}/{weights[pointer].name}" for _, pointer in pointers(graph)}
            save_graph(bind(graph, weights), self.temporary / name)
        return uses

    def _hashes(self) -> dict[str, tuple[str, int]]:
        """Return hash and size of every file; weight files are named by their hash."""
        paths = [path for path in self.temporary.rglob("*") if path.is_file() and path.name != MANIFEST]
        return {
            path.relative_to(self.temporary).as_posix(): (
                path.stem if path.parent.name == FOLDER else sha256(path),
                path.stat().st_size,
            )
            for path in paths
        }
