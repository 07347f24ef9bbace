"""Compares a manifest's entries on graphs with the graphs, whenever a bundle is opened.

Names, dtypes, shapes and in-place outputs are in the graphs themselves, and most sizes of the model follow
from shapes. All other entries (the longest sequence, ids, samplers) are covered by the manifest's digest:
see `janus_modular.bundles.digest_of`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from janus_export.bundle.contract import MAGNITUDE
from janus_export.bundle.graph_header import GraphHeader, TensorHeader
from janus_modular.graph_specs import axes_in

SIZES: Mapping[str, tuple[str, str, str, int]] = {
    "hidden_size": ("backbone", "inputs", "x", 2),
    "vocab_size": ("sample_text", "inputs", "noise", 1),
    "image_input.height": ("understand", "inputs", "pixels", 2),
    "image_input.width": ("understand", "inputs", "pixels", 3),
    "image_input.positions": ("understand", "outputs", "embeddings", 1),
}
"""Sizes of the model that are a dimension of a tensor: its graph, side, name, and axis."""


def axes_of(graphs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the names of the axes in the shapes of these graphs; for 3*images, the axis is images."""
    for graph in graphs:
        for tensor in (*graph["inputs"], *graph["outputs"]):
            yield from (axis for size in tensor["shape"] if isinstance(size, str) for axis in axes_in(size))


def header_problems(record: Mapping[str, Any], dtype: str, header: GraphHeader, name: str) -> Iterator[str]:
    """Yield the differences between a graph's entry in the manifest and the graph, in a variant's dtype."""
    for side in ("inputs", "outputs"):
        declared = [
            TensorHeader(
                tensor["name"], dtype if tensor.get("varies") else tensor["dtype"], tuple(tensor["shape"])
            )
            for tensor in record[side]
        ]
        actual = list(getattr(header, side))
        if declared != actual:
            of_manifest, of_graph = (
                ", ".join(str(tensor) for tensor in listed if tensor not in missing_from)
                or f"{len(listed)} in another order"
                for listed, missing_from in ((declared, actual), (actual, declared))
            )
            yield f"graphs.{name}.{side} has {of_manifest:.200}, the graph {of_graph:.200}"
    shapes = {tensor.name: tensor.shape for tensor in (*header.inputs, *header.outputs)}
    for present, past in record.get("states", ()):
        if present not in shapes or shapes[present] != shapes.get(past):
            yield f"graphs.{name}.states has {present} of {past}, which the graph lacks, or has in two shapes"
    if {tuple(pair) for pair in record["aliases"]} != set(header.aliases):
        yield (
            f"graphs.{name}.aliases has {len(record['aliases'])} pairs, the graph writes"
            f" {len(header.aliases)} outputs in place: {dict(header.aliases)!s:.120}"
        )


def size_problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield sizes of the model that differ from the shapes of its graphs, and empty ranges of axes."""
    for path, (graph, side, name, axis) in SIZES.items():
        declared, actual = _declared(manifest["model"], path), _dimension(manifest, graph, side, name, axis)
        if declared is not None and actual is not None and declared != actual:
            yield f"model.{path} is {declared}, {graph} has {actual}"
    for name, graph in manifest["graphs"].items():
        if graph.get("role") != "decode" or graph["outputs"][0]["dtype"] != "uint8":
            continue
        image, shape = manifest["model"]["image_target"], graph["outputs"][0]["shape"]
        if shape[1:] != [3, image["height"], image["width"]]:
            size = f"{image['height']} and {image['width']}"
            yield f"model.image_target.height and width are {size}, {name} has {shape}"
        if graph["outputs"][-1]["name"] != MAGNITUDE:
            yield f"graphs.{name} has no output '{MAGNITUDE}', which detects NaN and infinity in images"
    layers = len(manifest["graphs"].get("backbone", {}).get("aliases", ())) // 2
    if layers and manifest["cache"]["layers"] != layers:
        yield f"cache.layers is {manifest['cache']['layers']}, backbone has {layers}"
    for name, axis in manifest["axes"].items():
        if not axis["min"] <= axis["typical"] <= axis["max"]:
            yield f"axes.{name} is {axis}, expected min <= typical <= max"


def _declared(model: Mapping[str, Any], path: str) -> Any:
    for key in path.split("."):
        if key not in model:
            return None
        model = model[key]
    return model


def _dimension(manifest: Mapping[str, Any], graph: str, side: str, name: str, axis: int) -> int | None:
    for tensor in manifest["graphs"].get(graph, {}).get(side, ()):
        if (
            tensor["name"] == name
            and axis < len(tensor["shape"])
            and not isinstance(tensor["shape"][axis], str)
        ):
            return int(tensor["shape"][axis])
    return None
