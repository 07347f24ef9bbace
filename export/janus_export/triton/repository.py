"""Writing a model repository: the loop as a Python model, and the graphs that need no loop by themselves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from janus_export.bundle.bundle import Bundle, load_bundle
from janus_export.bundle.external_data import references
from janus_export.bundle.pruning import prune
from janus_export.errors import BundleError
from janus_export.triton.model_config import graph_config, graph_file, loop_config
from janus_modular.atomic_writes import atomic_replace_folder, write_text

ROLES = ("encode", "decode")
"""Roles of the generation path's graphs that are models by themselves, as `understand` is."""

SIDES = ("inputs", "outputs")

LOOP_MODEL = "janus"
"""The model that answers and draws."""

PROGRAM = '''"""The model that answers and draws; see janus_export.triton.python_model."""

from janus_export.triton.python_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    bundle: Path, repository: Path, *, variant: str | None = None, rows: int = 8
) -> dict[str, Path]:
    """Write a model repository for a variant of a bundle; return the folder of each model.

    The repository is a new folder. Its Python model runs in Triton's Python backend, where janus-modular
    must be installed with the extras ``runtime`` (or ``gpu``) and ``serve``.

    Raises:
        BundleError: the bundle is damaged or has no such variant, or the repository exists.
    """
    opened = load_bundle(bundle)
    variant = variant or opened.variants[0]
    if variant not in opened.variants:
        raise BundleError(f"{bundle} has no variant '{variant}'. It has: {', '.join(opened.variants)}")
    opened.verify_weights(opened.manifest["variants"][variant]["weights"])
    if repository.exists():
        raise BundleError(f"{repository} exists: name a new folder, or remove it.")
    with atomic_replace_folder(repository, error=BundleError) as temporary:
        _write_loop(opened, variant, temporary / LOOP_MODEL, rows)
        for graph in _graphs(opened, variant):
            _write_graph(opened, variant, graph, temporary / graph)
        names = [folder.name for folder in sorted(temporary.iterdir())]
    return {name: repository / name for name in names}


def _graphs(bundle: Bundle, variant: str) -> Iterator[str]:
    """Yield the graphs that are models by themselves: all their tensors begin with the axis of images."""
    records = bundle.manifest["graphs"]
    for graph in bundle.manifest["variants"][variant]["files"]:
        first_axes = {str(tensor["shape"][:1]) for side in SIDES for tensor in records[graph][side]}
        if first_axes == {"['images']"} and (graph == "understand" or records[graph].get("role") in ROLES):
            yield graph


def _write_loop(bundle: Bundle, variant: str, folder: Path, rows: int) -> None:
    version = folder / "1"
    version.mkdir(parents=True)
    if len(bundle.variants) > 1:
        prune(bundle.folder, variants=[variant], target=version / "bundle")
    else:
        shutil.copytree(bundle.folder, version / "bundle")
    write_text(version / "model.py", PROGRAM)
    parameters = {"bundle": "bundle", "variant": variant, "rows": str(rows)}
    write_text(folder / "config.pbtxt", loop_config(folder.name, parameters))


def _write_graph(bundle: Bundle, variant: str, graph: str, folder: Path) -> None:
    version, source = folder / "1", bundle.path(graph, variant)
    version.mkdir(parents=True)
    shutil.copyfile(source, version / graph_file(graph))
    for location in {reference.location for reference in references(source)}:
        target = version / location
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.folder / location, target)
    axis = bundle.contract(graph, variant)["inputs"][0]["shape"][0]
    max_batch = bundle.manifest["axes"][axis]["max"]
    write_text(folder / "config.pbtxt", graph_config(graph, bundle.contract(graph, variant), max_batch))
