"""A bundle: the folder that production runs. Read and checked here, without torch or ONNX.

manifest.json      what everything is: graphs, axes, variants, hashes, what was checked (bundle.schema.json)
GRAPH.VARIANT.onnx the graphs, in the root, since graphs can only point below themselves
weights/HASH.safetensors   what they point to, by byte range: a file for each set of graphs that share it
tokenizer files, processor.json   how words and images become what the graphs take
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from janus_export.bundle.external_data import references
from janus_export.bundle.files import sha256
from janus_export.bundle.graph_header import GraphHeader, read_header
from janus_export.bundle.manifest_graphs import header_faults, size_faults
from janus_export.bundle.modes import mode_of, modes_of
from janus_export.bundle.schema import faults_of
from janus_export.errors import BundleError
from janus_modular.atomic_writes import write_text
from janus_modular.bundles import MANIFEST, find_bundle, is_bundle
from janus_modular.foreign import printable, reason
from janus_modular.locking import locked

__all__ = [
    "LOCK",
    "MANIFEST",
    "ONNX_RUNTIME",
    "SCHEMA",
    "Bundle",
    "graph_faults",
    "inside",
    "is_bundle",
    "load_bundle",
    "write_manifest",
]

SCHEMA = 3
"""Version of the manifest; a bundle of another one is refused."""

LOCK = ".lock"
"""Held, and then removed, by whoever notes a result in a bundle or puts another in its place."""

ONNX_RUNTIME = "1.25"
"""The oldest ONNX Runtime that runs bundles: the first with TensorScatter, which writes caches in place.

On a CPU, versions from it to 1.32 gave the same answers and drawings in float32. In int4 what is nearly as
likely may be chosen instead, from 1.31 on; 1.29.0 has other numbers in float16.
"""

REBUILD = "Build it again with: janus-modular export MODEL {folder}"
SECTIONS = ("source", "versions", "model", "variants", "graphs", "axes", "cache", "sha256", "bytes")
SHOWN = 5  # faults of a manifest that one error lists
SHOWN_LETTERS = 120  # of a name that a graph has


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest and files were found to be what they should."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def variants(self) -> list[str]:
        """The names of its variants: fp32, cpu-int4, ..."""
        return list(self.manifest["variants"])

    @property
    def graphs(self) -> Mapping[str, Mapping[str, Any]]:
        """The inputs and outputs of each graph, by name."""
        return self.manifest["graphs"]

    @property
    def modes(self) -> list[str]:
        """The modes that its graphs are sufficient for: text, understanding, drawing."""
        return modes_of(self.graphs)

    def contract(self, graph: str, variant: str) -> dict[str, Any]:
        """Return what a graph takes and gives, as the manifest says it, in the dtypes of a variant."""
        dtype = self.manifest["variants"][variant]["dtype"]
        record = self.manifest["graphs"][graph]
        slots = {
            side: [{**slot, "dtype": dtype if slot.get("varies") else slot["dtype"]} for slot in record[side]]
            for side in ("inputs", "outputs")
        }
        return {**record, **slots}

    def path(self, graph: str, variant: str) -> Path:
        """Find a graph's file.

        Raises:
            BundleError: it has no such variant, or the variant no such graph.
        """
        if variant not in self.manifest["variants"]:
            raise BundleError(f"{self.folder} has no variant '{variant}'. It has: {', '.join(self.variants)}")
        files = self.manifest["variants"][variant]["files"]
        if graph not in files:
            raise BundleError(
                f"{self.folder} has no graph '{graph}' in {variant}: it was made for"
                f" {', '.join(self.modes) or 'no mode'}, and this graph is for {mode_of(graph)}. With all"
                f" modes: {REBUILD.format(folder=self.folder)}"
            )
        return self.folder / files[graph]

    def verify_weights(self, names: Iterable[str] | None = None) -> None:
        """Hash the weights too, or only the files of these ``names``, which takes a second a gigabyte.

        Raises:
            BundleError: a file is not what it was when the bundle was written.
        """
        hashes = self.manifest["sha256"]
        for name in hashes if names is None else names:
            if sha256(self.folder / name) != hashes[name]:
                raise BundleError(
                    f"{self.folder / name} has changed: its hash is another. {_build_hint(self.folder)}"
                )

    def record(self, section: str, key: str, value: Any) -> None:
        """Note a result (``parity``, ``built`` or ``executed``) in the manifest, on disk too.

        What others have noted since this bundle was opened is kept.

        Raises:
            BundleError: another export has taken the bundle's place since; nothing is written.
        """
        with locked(self.folder / LOCK, self.folder, wait=True, error=BundleError):
            now = _read_manifest(self.folder)
            if any(now[part] != self.manifest[part] for part in ("variants", "sha256")):
                raise BundleError(
                    f"{self.folder} was replaced by another export meanwhile, so '{key}' is not noted in it."
                    " Run the command again."
                )
            now.setdefault(section, {})[key] = value
            write_manifest(self.folder, now)
        self.manifest.update(now)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest aside and rename it, so that a reader finds the old or the new."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def load_bundle(folder: str | Path, *, check_graphs: bool = True) -> Bundle:
    """Open a bundle, or refuse it; with ``check_graphs`` also one whose manifest contradicts its graphs.

    Checked every time: the manifest, by its schema and against the graphs; that no file is missing, cut
    short, or outside of the folder (paths inside graphs and links included; those of a snapshot in a hub
    cache may lead to its own repository's ``blobs``), the hashes of all but the weights. Those are large:
    `Bundle.verify_weights` and ``inspect --hashes`` read them.

    Raises:
        BundleError: any of it does not hold; says which, and the command that builds it again.
    """
    folder = find_bundle(folder) or Path(folder).expanduser()
    manifest = _read_manifest(folder)
    try:
        _check(folder, manifest)
        if check_graphs and (problems := graph_faults(folder, manifest)):
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise BundleError(
                f"{folder / MANIFEST} does not describe its graphs: {'; '.join(problems[:SHOWN])}{more}."
                f" {_build_hint(folder)}"
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise BundleError(f"{folder / MANIFEST} is malformed: {error!r}. {_build_hint(folder)}") from error
    return Bundle(folder, manifest)


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    if problems := list(faults_of(manifest)):
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise BundleError(
            f"{folder / MANIFEST} is malformed: {'; '.join(problems[:SHOWN])}{more}. {_build_hint(folder)}"
        )
    for name, size in manifest["bytes"].items():
        path = inside(folder, name)
        if not path.is_file():
            raise BundleError(f"{folder} lacks {name}. {_build_hint(folder)}")
        if path.stat().st_size != size:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {size}. {_build_hint(folder)}"
            )
    weights = {name for variant in manifest["variants"].values() for name in variant["weights"]}
    graphs = {name for variant in manifest["variants"].values() for name in variant["files"].values()}
    if unlisted := sorted((weights | graphs) - set(manifest["sha256"])):
        raise BundleError(
            f"the manifest of {folder} has no hash for {', '.join(unlisted)}. {_build_hint(folder)}"
        )
    for name, digest in manifest["sha256"].items():
        if name not in weights and sha256(inside(folder, name)) != digest:
            raise BundleError(f"{folder / name} has changed: its hash is another. {_build_hint(folder)}")
    for name in sorted(graphs):
        _check_references(folder, name, weights)


def graph_faults(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return what a manifest says of graphs and the graphs, of all its variants, do not.

    Raises:
        BundleError: a file is no graph.
    """
    headers, problems = dict[str, GraphHeader](), list[str]()
    for variant in manifest["variants"].values():
        for graph, file in variant["files"].items():
            if file not in headers:
                try:
                    headers[file] = read_header(folder / file)
                except ValueError as error:
                    raise BundleError(f"{error}. {_build_hint(folder)}") from error
            problems += header_faults(manifest["graphs"][graph], variant["dtype"], headers[file], graph)
    return list(dict.fromkeys([*problems, *size_faults(manifest)]))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = inside(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}. {_instead(folder)}") from error
    except NotADirectoryError as error:
        raise BundleError(f"{folder} is a file, expected a bundle: a folder. {_instead(folder)}") from error
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}. {_build_hint(folder)}") from error
    version = manifest.get("schema") if isinstance(manifest, dict) else None
    if version != SCHEMA:
        upgrade = isinstance(version, int) and version > SCHEMA
        hint = "Upgrade with: pip install --upgrade janus-modular" if upgrade else _build_hint(folder)
        raise BundleError(
            f"{path} is of schema {printable(repr(version), 40)}, this version reads schema {SCHEMA}. {hint}"
        )
    if missing := [name for name in SECTIONS if not isinstance(manifest.get(name), dict)]:
        raise BundleError(f"{path} lacks {', '.join(missing)}. {_build_hint(folder)}")
    if set(manifest["sha256"]) != set(manifest["bytes"]):
        raise BundleError(f"{path} has hashes and sizes of different files. {_build_hint(folder)}")
    return manifest


def inside(folder: Path, name: str) -> Path:
    """Return the path of a bundle's file; refuse one that leads, or is linked, out of it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
        raise BundleError(
            f"{folder} points to '{printable(name, SHOWN_LETTERS)}', which is not inside it."
            f" {_build_hint(folder)}"
        )
    path = folder / pure
    try:
        target, allowed = path.resolve(), [folder.resolve(), *_blobs(folder)]
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 raise the latter for a loop
        raise BundleError(
            f"{printable(path)} is a link that leads nowhere: {reason(error)}. {_build_hint(folder)}"
        ) from error
    if not any(target.is_relative_to(root) for root in allowed):
        raise BundleError(
            f"{path} is a link out of the bundle, to {target}; expected a file in"
            f" {' or '.join(map(str, allowed))}. Bring the file itself:"
            f" cp --recursive --dereference {folder} COPY"
        )
    return path


def _blobs(folder: Path) -> list[Path]:
    """Return where links of a hub cache lead: REPOSITORY/blobs from REPOSITORY/snapshots/COMMIT."""
    resolved = folder.resolve()
    return [
        parent.parent.parent / "blobs"
        for parent in (resolved, *resolved.parents)
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir()
    ][:1]


def _check_references(folder: Path, name: str, weights: Iterable[str]) -> None:
    try:
        external = references(folder / name)
    except ValueError as error:
        raise BundleError(f"{error}. {_build_hint(folder)}") from error
    for reference in external:
        tensor, location = (printable(text, SHOWN_LETTERS) for text in (reference.tensor, reference.location))
        path = inside(folder, reference.location)
        if reference.location not in weights:
            raise BundleError(
                f"{name} keeps '{tensor}' in '{location}', which the manifest does not list."
                f" {_build_hint(folder)}"
            )
        size = path.stat().st_size
        if reference.offset + (reference.length or 0) > size:
            raise BundleError(f"{name} keeps '{tensor}' beyond the end of {location}. {_build_hint(folder)}")


def _build_hint(folder: Path) -> str:
    """Return how to repair a damaged bundle: one of a hub cache is fetched again, others are built again."""
    for blobs in _blobs(folder):
        repository_type, *names = blobs.parent.name.split("--")
        if repository_type == "models" and names:
            return f"Fetch it again with: hf download {'/'.join(names)} --force-download"
    return REBUILD.format(folder=folder)


def _instead(folder: Path) -> str:
    """Return what to do about a folder that is no bundle, which an export does not replace."""
    if (folder / "config.json").is_file():
        return f"It looks like a checkpoint, to make a bundle of: janus-modular export {folder} BUNDLE"
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return "Give the folder that was written by: janus-modular export MODEL BUNDLE"
    return _build_hint(folder)
