"""A bundle: the exported folder. This module reads and checks it without torch or ONNX.

manifest.json      graphs, axes, variants, hashes, results of `verify` (see bundle.schema.json)
GRAPH.VARIANT.onnx the graphs, in the root: ONNX external data must be below a graph's folder
weights/HASH.safetensors   their weights, by byte range: a file for each set of graphs that share it
tokenizer files, processor.json   preprocessing of text and images
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from janus_export.bundle.external_data import references
from janus_export.bundle.graph_header import GraphHeader, read_header
from janus_export.bundle.manifest_graphs import header_problems, size_problems
from janus_export.bundle.modes import MODES, mode_of, modes_of
from janus_export.bundle.schema import problems_of
from janus_export.errors import BundleError
from janus_modular.atomic_writes import write_text
from janus_modular.bundles import MANIFEST, find_bundle, is_bundle
from janus_modular.errors import list_briefly
from janus_modular.foreign import printable, reason, sha256
from janus_modular.locking import locked
from janus_modular.suggest import did_you_mean, new_name

__all__ = [
    "LOCK",
    "MANIFEST",
    "ONNX_RUNTIME",
    "SCHEMA",
    "Bundle",
    "graph_problems",
    "inside",
    "is_bundle",
    "load_bundle",
    "write_manifest",
]

SCHEMA = 4
"""Version of the manifest; a bundle with another version is an error."""

LOCK = ".lock"
"""The lock file of a process that records a result in a bundle or replaces the bundle; removed afterwards."""

ONNX_RUNTIME = "1.25"
"""The oldest ONNX Runtime that runs bundles: the first with TensorScatter, which writes caches in place.

On a CPU, versions from it to 1.32 gave the same answers and drawings in float32. From
1.31 on, int4 may choose another token of nearly equal probability; 1.29.0 differs in float16.
"""

REBUILD = "Export it again with: janus-modular export MODEL {folder}"
SECTIONS = ("source", "versions", "model", "variants", "graphs", "axes", "cache", "sha256", "bytes")
MAX_LISTED = 5  # most problems of a manifest that one error lists
SHOWN_LETTERS = 120  # most characters of a file name that an error quotes


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, whose manifest and files were checked."""

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
        """The supported modes: text, understanding, drawing."""
        return modes_of(self.graphs)

    def contract(self, graph: str, variant: str) -> dict[str, Any]:
        """Return a graph's inputs and outputs as declared in the manifest, with the dtypes of a variant.

        Raises:
            BundleError: the bundle has no such variant, or the variant has no such graph.
        """
        self.path(graph, variant)
        dtype = self.manifest["variants"][variant]["dtype"]
        record = self.manifest["graphs"][graph]
        tensors = {
            side: [
                {**tensor, "dtype": dtype if tensor.get("varies") else tensor["dtype"]}
                for tensor in record[side]
            ]
            for side in ("inputs", "outputs")
        }
        return {**record, **tensors}

    def path(self, graph: str, variant: str) -> Path:
        """Find a graph's file.

        Raises:
            BundleError: the bundle has no such variant, or the variant has no such graph.
        """
        if variant not in self.manifest["variants"]:
            raise BundleError(f"{self.folder} has no variant '{variant}'. It has: {', '.join(self.variants)}")
        files = self.manifest["variants"][variant]["files"]
        if graph not in files:
            modes = (
                f"Its modes are {', '.join(self.modes) or 'none'}, and this graph is for {mode_of(graph)}."
                f" {REBUILD.format(folder=self.folder)}"
            )
            hint = new_name(graph, files) or (modes if len(self.modes) < len(MODES) else "")
            again = f"Bundles of earlier versions may lack it. {REBUILD.format(folder=self.folder)}"
            raise BundleError(
                f"{self.folder} has no graph '{graph}' in {variant}; it has {', '.join(files)}."
                f" {hint or f'{did_you_mean(graph, files)} {again}'.strip()}"
            )
        return self.folder / files[graph]

    def fingerprint(self, variant: str) -> str:
        """Return a digest of a variant's graphs and weights, from their hashes in the manifest."""
        record, hashes = self.manifest["variants"][variant], self.manifest["sha256"]
        names = sorted([*record["files"].values(), *record["weights"]])
        return hashlib.sha256(json.dumps([hashes[name] for name in names]).encode()).hexdigest()

    def verify_weights(self, names: Iterable[str] | None = None) -> None:
        """Check the hashes of all files, or only of ``names``: about a second per gigabyte.

        Raises:
            BundleError: a file has changed since the bundle was written.
        """
        hashes = self.manifest["sha256"]
        for name in hashes if names is None else names:
            if sha256(self.folder / name) != hashes[name]:
                raise BundleError(
                    f"{self.folder / name} has changed: its hash differs. {_build_hint(self.folder)}"
                )

    def record(self, section: str, key: str, value: Any) -> None:
        """Record a result (``parity``, ``built`` or ``executed``) in the manifest, also on disk.

        Results that other processes recorded since this bundle was opened are kept.

        Raises:
            BundleError: another export replaced the bundle since it was opened; nothing is written.
        """
        with locked(self.folder / LOCK, self.folder, wait=True, error=BundleError):
            now = _read_manifest(self.folder)
            if any(now[part] != self.manifest[part] for part in ("variants", "sha256")):
                raise BundleError(
                    f"{self.folder} was replaced by another export meanwhile, so '{key}' was not recorded."
                    " Run the command again."
                )
            now.setdefault(section, {})[key] = value
            write_manifest(self.folder, now)
        self.manifest.update(now)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest atomically: to a temporary file, which is then renamed."""
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def load_bundle(folder: str | Path, *, check_graphs: bool = True) -> Bundle:
    """Open a bundle and check it; without ``check_graphs``, the manifest is not compared with the graphs.

    The checks: the manifest fits its schema and the graphs; no file is missing, truncated, or outside of the
    folder (this includes paths inside graphs, and links, except links of a hub cache into its repository's
    ``blobs``); the hashes of all files but the weights, which are large: `Bundle.verify_weights` and
    ``inspect --hashes`` check those.

    Raises:
        BundleError: a check fails; names it, and the command that repairs the bundle.
    """
    folder = find_bundle(folder) or Path(folder).expanduser()
    manifest = _read_manifest(folder)
    try:
        _check(folder, manifest)
        if check_graphs and (problems := graph_problems(folder, manifest)):
            raise BundleError(
                f"{folder / MANIFEST} does not describe its graphs:"
                f" {list_briefly(problems, MAX_LISTED, '; ')}."
                f" {_build_hint(folder)}"
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise BundleError(f"{folder / MANIFEST} is malformed: {error!r}. {_build_hint(folder)}") from error
    return Bundle(folder, manifest)


def _check(folder: Path, manifest: dict[str, Any]) -> None:
    if problems := list(problems_of(manifest)):
        raise BundleError(
            f"{folder / MANIFEST} is malformed: {list_briefly(problems, MAX_LISTED, '; ')}."
            f" {_build_hint(folder)}"
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
            raise BundleError(f"{folder / name} has changed: its hash differs. {_build_hint(folder)}")
    for name in sorted(graphs):
        _check_references(folder, name, weights)


def graph_problems(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the differences between a manifest's entries on graphs and the graphs of all its variants.

    Raises:
        BundleError: a file is not an ONNX graph.
    """
    headers, problems = dict[str, GraphHeader](), list[str]()
    for variant in manifest["variants"].values():
        for graph, file in variant["files"].items():
            if file not in headers:
                try:
                    headers[file] = read_header(folder / file)
                except ValueError as error:
                    raise BundleError(f"{error}. {_build_hint(folder)}") from error
            problems += header_problems(manifest["graphs"][graph], variant["dtype"], headers[file], graph)
    return list(dict.fromkeys([*problems, *size_problems(manifest)]))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = inside(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        problem = f"there is no folder '{folder}'"
        if folder.is_dir():
            problem = f"{folder} is no bundle: it has no {MANIFEST}"
        raise BundleError(f"{problem}. {_instead(folder)}") from error
    except NotADirectoryError as error:
        raise BundleError(f"{folder} is a file, expected a bundle: a folder. {_instead(folder)}") from error
    except (ValueError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {reason(error)}. {_build_hint(folder)}") from error
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
    """Return the path of a bundle's file; raise an error if the path or a link leads out of the bundle."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
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
            f" {' or '.join(map(str, allowed))}. Copy the file itself:"
            f" cp --recursive --dereference {folder} COPY"
        )
    return path


def _blobs(folder: Path) -> list[Path]:
    """Return the target folder of links in a hub cache: REPOSITORY/blobs for REPOSITORY/snapshots/COMMIT."""
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
    sizes: dict[str, int] = {}
    for reference in external:
        tensor, location = reference.tensor, reference.location
        if location not in sizes:
            path = inside(folder, location)
            if location not in weights:
                raise BundleError(
                    f"{name} keeps '{printable(tensor, SHOWN_LETTERS)}' in"
                    f" '{printable(location, SHOWN_LETTERS)}', which the manifest does not list."
                    f" {_build_hint(folder)}"
                )
            sizes[location] = path.stat().st_size
        if reference.offset + (reference.length or 0) > sizes[location]:
            raise BundleError(
                f"{name} keeps '{printable(tensor, SHOWN_LETTERS)}' beyond the end of {location}."
                f" {_build_hint(folder)}"
            )


def _build_hint(folder: Path) -> str:
    """Return how to repair a damaged bundle: download it again (hub cache), or export it again."""
    for blobs in _blobs(folder):
        repository_type, *names = blobs.parent.name.split("--")
        if repository_type == "models" and names:
            return f"Fetch it again with: hf download {'/'.join(names)} --force-download"
    return REBUILD.format(folder=folder)


def _instead(folder: Path) -> str:
    """Return the hint for a folder that is not a bundle: `export` does not replace such a folder."""
    if not folder.exists():
        return f"Check the path, or write a bundle there: janus-modular export MODEL {folder}"
    if (folder / "config.json").is_file():
        return f"It looks like a checkpoint; to export it: janus-modular export {folder} BUNDLE"
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        return "Give the folder that was written by: janus-modular export MODEL BUNDLE"
    return _build_hint(folder)
