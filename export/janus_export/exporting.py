"""From a checkpoint to a bundle: lower the graphs, write the weights, bind the one to the other.

It all happens in a folder beside the bundle, which takes the bundle's place at the end. What is finished
there is kept when an export is interrupted, and used by the next one of the same source and settings.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from janus_export import manifest
from janus_export.axes import Ranges
from janus_export.bundle import MANIFEST, is_bundle, write_manifest
from janus_export.errors import BundleError
from janus_export.graphs import Graph, declare
from janus_export.settings import VARIANTS, ExportConfig
from janus_export.storage import sha256, write_stream
from janus_export.to_onnx import faked, to_onnx
from janus_export.weights import FOLDER, Source, bind, detach, native_names, wanted
from janus_modular import Plugins
from janus_modular.checkpoints.opening import Opened, describe

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOWERED, STATE = "lowered", "export.json"

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

    A bundle that stands there is replaced when the new one is complete, and not before.

    Raises:
        ExportError: a part of the model cannot become a graph.
        BundleError: something else stands there, or the disk did not take it.
        CheckpointError: the source is no checkpoint, or damaged.
    """
    config = config or ExportConfig()
    folder = Path(target).expanduser().absolute()
    aside, old = (folder.with_name(f".{folder.name}.{word}") for word in ("export", "old"))
    if old.exists() and not folder.exists():  # stopped between two renames
        old.rename(folder)
    if folder.exists() and not (is_bundle(folder) or (folder.is_dir() and not any(folder.iterdir()))):
        raise BundleError(f"{folder} exists and is no bundle, so it is not replaced. Choose another folder.")
    try:
        _Export(str(source), describe(source, plugins=plugins), aside, config, tell).run()
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except OSError as error:
        raise BundleError(
            f"{folder} could not be written: {error}. What was there before is untouched; the same command"
            " goes on where this one stopped."
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


class _Export:
    """One export at work in its folder."""

    def __init__(self, named: str, opened: Opened, aside: Path, config: ExportConfig, tell: Tell) -> None:
        self.opened, self.aside, self.config, self.tell = opened, aside, config, tell
        self.source = describe_source(named, opened)
        self.names = native_names(opened.model)
        self.tensors = Source(opened.model, opened.tensors, str(opened.folder))
        self.graphs: dict[str, list[Graph]] = {}  # declared, by dtype

    def run(self) -> None:
        """Do all that is not done yet."""
        model = manifest.describe_model(self.opened.model, self.opened.processor)
        state = self._begin()
        forms = self._lower(state)
        files = self._write_weights(forms, state)
        variants = self._bind(forms, files)
        self.opened.processor.save(self.aside)
        shutil.rmtree(self.aside / LOWERED)
        (self.aside / STATE).unlink()
        contents = {
            path.relative_to(self.aside).as_posix(): path
            for path in sorted(self.aside.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        write_manifest(
            self.aside,
            manifest.compose_manifest(
                source=self.source,
                model=model,
                graphs=self.graphs[VARIANTS[self.config.variants[0]].dtype],
                variants=variants,
                files={
                    name: (path.stem if path.parent.name == FOLDER else sha256(path), path.stat().st_size)
                    for name, path in contents.items()
                },
            ),
        )

    def _begin(self) -> dict[str, Any]:
        """Return what an interrupted export of the same source and settings finished; else start anew."""
        wanted = {"source": self.source, "config": asdict(self.config), "versions": manifest.versions()}
        state: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            state = json.loads((self.aside / STATE).read_text("utf-8"))
        if {name: state.get(name) for name in wanted} != wanted:
            shutil.rmtree(self.aside, ignore_errors=True)
            state = wanted | {"done": {}}
        (self.aside / LOWERED).mkdir(parents=True, exist_ok=True)
        return state

    def _lower(self, state: dict[str, Any]) -> dict[str, dict[str, ir.Model]]:
        """Return the graphs by variant and name, exported or kept; no weight is in them."""
        dtypes = list(dict.fromkeys(VARIANTS[name].dtype for name in self.config.variants))
        forms: dict[str, dict[str, ir.Model]] = {}
        for number, dtype in enumerate(dtypes):
            mode = faked(self.opened.model, DTYPES[dtype])
            with mode:
                self.graphs[dtype] = self._declare()
            forms[dtype] = {}
            for place, graph in enumerate(self.graphs[dtype]):
                self.tell(
                    "graphs", number * len(self.graphs[dtype]) + place, len(dtypes) * len(self.graphs[dtype])
                )
                path = self.aside / LOWERED / f"{graph.name}.{dtype}.onnx"
                if not self._is_done(path, state):
                    lowered = to_onnx(graph, mode)
                    detach(lowered, self.names, dtype)
                    ir.save(lowered, path)
                    self._note(path, state)
                forms[dtype][graph.name] = ir.load(path)
        total = len(dtypes) * len(self.graphs[dtypes[0]])
        self.tell("graphs", total, total)
        return {name: forms[VARIANTS[name].dtype] for name in self.config.variants}

    def _declare(self) -> list[Graph]:
        model, config = self.opened.model, self.config
        ranges = Ranges.of(
            context=model.backbone.context, rows=config.rows, capacity=config.capacity, images=config.images
        )
        return declare(model, ranges, forbidden=self.opened.processor.forbidden)

    def _write_weights(
        self, forms: Mapping[str, Mapping[str, ir.Model]], state: dict[str, Any]
    ) -> dict[str, Path]:
        """Write what the graphs point to, one file for each kind; return the files."""
        graphs = {id(graph): graph for form in forms.values() for graph in form.values()}
        files = {}
        for kind, names in wanted(graphs.values()).items():
            tensors = self.tensors.stored(names, DTYPES[kind])
            total, done = sum(one.size for one in tensors), 0

            def count(size: int, kind: str = kind, total: int = total) -> None:
                nonlocal done
                done += size
                self.tell(f"weights {kind}", done, total)

            path = self.aside / FOLDER / state["done"].get(kind, "none")
            if not path.is_file():
                path = write_stream(tensors, self.aside / FOLDER, tell=count)
                state["done"][kind] = path.name
                self._save(state)
            files[kind] = path
        return files

    def _bind(
        self, forms: Mapping[str, Mapping[str, ir.Model]], files: Mapping[str, Path]
    ) -> dict[str, dict[str, Any]]:
        """Write each graph where it belongs, pointing at its weights; describe the variants."""
        variants = {}
        for variant, graphs in forms.items():
            kind = VARIANTS[variant].dtype
            named = {name: f"{name}.{kind}.onnx" for name in graphs}
            used = {one for graph in graphs.values() for one in wanted([graph])} if graphs else set()
            for name, graph in graphs.items():
                path = self.aside / named[name]
                if not path.exists():
                    ir.save(bind(graph, files), path)
                    onnx.checker.check_model(path)
            variants[variant] = {
                "dtype": str(DTYPES[kind]).removeprefix("torch."),
                "files": named,
                "weights": sorted(f"{FOLDER}/{files[one].name}" for one in used),
                "quantisation": None,
            }
        return variants

    def _is_done(self, path: Path, state: Mapping[str, Any]) -> bool:
        return path.is_file() and state["done"].get(path.name) == sha256(path)

    def _note(self, path: Path, state: dict[str, Any]) -> None:
        state["done"][path.name] = sha256(path)
        self._save(state)

    def _save(self, state: Mapping[str, Any]) -> None:
        (self.aside / STATE).write_text(json.dumps(state), "utf-8")


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
