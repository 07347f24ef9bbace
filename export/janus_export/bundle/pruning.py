"""Removes variants or modes from a bundle. Needs neither torch nor ONNX.

Nothing is recomputed: the remaining graphs, weights and engines are the same files, because every graph that
uses a weight file uses all of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

from janus_export.bundle.bundle import LOCK, Bundle, load_bundle, write_manifest
from janus_export.bundle.external_data import references
from janus_export.bundle.manifest_graphs import axes_of
from janus_export.bundle.modes import MODES, graphs_of, modes_of
from janus_export.bundle.sizes import common_files
from janus_export.errors import BundleError
from janus_modular.atomic_writes import atomic_replace_folder
from janus_modular.bundles import DIGESTS, digest_of
from janus_modular.locking import locked
from janus_modular.plugins.lock import LOCK as PLUGINS_LOCK
from janus_modular.suggest import did_you_mean


def prune(
    folder: str | Path,
    *,
    variants: Sequence[str] = (),
    only: Sequence[str] = (),
    target: str | Path | None = None,
) -> Path:
    """Keep these variants and modes of a bundle (none named: all), in place or in a new folder; return it.

    Results of `verify` are kept, unless a mode is removed: they were obtained on a bundle with more modes.

    Raises:
        BundleError: the bundle is damaged or has no such variant or mode, nothing would be removed, or the
            new folder exists or cannot be written. The bundle is unchanged then.
    """
    bundle = load_bundle(folder)
    pruned_manifest(bundle, variants, only)  # invalid requests fail before anything is written
    source = bundle.folder.resolve()
    destination = Path(target).expanduser().resolve() if target is not None else source
    if target is not None and destination.exists():
        raise BundleError(
            f"{destination} exists, so the pruned bundle is not written there. Choose another folder."
        )
    if destination != source and destination.is_relative_to(source):
        raise BundleError(f"{destination} is inside of the bundle itself. Choose a folder beside it.")
    # In place, no other process may record a result meanwhile: it would be lost.
    lock = (
        locked(source / LOCK, source, wait=True, error=BundleError)
        if destination == source
        else nullcontext()
    )
    try:
        with lock, atomic_replace_folder(destination, error=BundleError) as temporary:
            manifest = pruned_manifest(load_bundle(source), variants, only)
            for name in _files(manifest):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                bring = _link if destination == source else shutil.copyfile
                bring(source / name, temporary / name)
            write_manifest(temporary, manifest)
            if (source / PLUGINS_LOCK).is_file():  # the recorded plugins stay the same
                shutil.copyfile(source / PLUGINS_LOCK, temporary / PLUGINS_LOCK)
    except OSError as error:
        raise BundleError(f"{destination} could not be written: {error}. {source} is unchanged.") from error
    return destination


def pruned_manifest(bundle: Bundle, variants: Sequence[str], only: Sequence[str]) -> dict[str, Any]:
    """Return the manifest of a bundle with only these variants and modes (none named: all).

    Raises:
        BundleError: the bundle has no such variant or mode, or nothing would be removed.
    """
    _known("variant", variants, bundle.variants, bundle.folder)
    _known("mode", only, MODES, bundle.folder)
    if missing := [mode for mode in only if mode not in bundle.modes]:
        raise BundleError(
            f"{bundle.folder} cannot keep {', '.join(missing)}: it has {', '.join(bundle.modes) or 'no mode'}"
        )
    old = bundle.manifest
    manifest = deepcopy(old)
    kept = [name for name in bundle.variants if not variants or name in variants]
    graphs = graphs_of(only, list(bundle.graphs)) if only else tuple(bundle.graphs)
    if kept == bundle.variants and len(graphs) == len(bundle.graphs):
        raise BundleError(
            f"{bundle.folder} has nothing to remove: name fewer than its variants ({', '.join(kept)})"
            f" or modes ({', '.join(bundle.modes)})"
        )
    manifest["variants"] = {name: _variant(bundle, name, graphs) for name in kept}
    manifest["graphs"] = {name: old["graphs"][name] for name in graphs}
    manifest["modes"] = modes_of(manifest["graphs"])
    axes = set(axes_of(manifest["graphs"].values()))
    manifest["axes"] = {name: axis for name, axis in old["axes"].items() if name in axes}
    records = manifest["variants"].values()
    files = {name for record in records for name in (*record["files"].values(), *record["weights"])}
    files |= common_files(old)
    for section in ("sha256", "bytes"):
        manifest[section] = {name: value for name, value in old[section].items() if name in files}
    _prune_results(manifest, kept, graphs, whole=len(graphs) == len(bundle.graphs))
    manifest[DIGESTS] = {  # not of a variant whose record was edited
        name: digest_of(manifest, name) for name in kept if old[DIGESTS].get(name) == digest_of(old, name)
    }
    return manifest


def _variant(bundle: Bundle, name: str, graphs: Iterable[str]) -> dict[str, Any]:
    record = deepcopy(bundle.manifest["variants"][name])
    record["files"] = {graph: file for graph, file in record["files"].items() if graph in graphs}
    external = [
        reference for file in record["files"].values() for reference in references(bundle.folder / file)
    ]
    used = {reference.location for reference in external}
    record["weights"] = [file for file in record["weights"] if file in used]
    return record


def _prune_results(
    manifest: dict[str, Any], variants: Sequence[str], graphs: Sequence[str], *, whole: bool
) -> None:
    """Keep the results and engines that are still valid for the pruned bundle."""
    built = {
        key: dict(record)
        for key, record in manifest.get("built", {}).items()
        if record["variant"] in variants
    }
    for engines in built.values():
        engines["engines"] = {name: engine for name, engine in engines["engines"].items() if name in graphs}
    manifest["built"] = {key: engines for key, engines in built.items() if engines["engines"]}
    parity = manifest.get("parity", {})
    manifest["parity"] = {
        key: result for key, result in parity.items() if whole and key.split(" ")[0] in variants
    }
    executed = manifest.get("executed", {})
    manifest["executed"] = {
        key: result for key, result in executed.items() if whole and key in manifest["built"]
    }


def _files(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Return every file of a bundle but its manifest."""
    yield from manifest["bytes"]
    for built in manifest["built"].values():
        for engine in built["engines"].values():
            yield engine["file"]
            if engine["inspector"]:
                yield engine["inspector"]


def _link(source: Path, target: Path) -> None:
    """Hard-link a file into the pruned bundle, or copy it if that fails."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _known(noun: str, names: Iterable[str], known: Sequence[str], folder: Path) -> None:
    for name in names:
        if name not in known:
            raise BundleError(
                f"{folder} has no {noun} '{name}'. {did_you_mean(name, known)} It has: {', '.join(known)}"
            )
