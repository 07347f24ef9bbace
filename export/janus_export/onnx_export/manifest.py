"""What a bundle says of itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from janus_export.bundle.axes import Axis
from janus_export.bundle.bundle import ONNX_RUNTIME, SCHEMA
from janus_export.bundle.modes import modes_of
from janus_export.onnx_export.graphs import Graph, Slot
from janus_export.onnx_export.quantize import Outcome
from janus_export.onnx_export.rounding import Rounding
from janus_modular import JanusModel, Processor, __version__
from janus_modular.bundles import DIGESTS, digest_of

RECORDED = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def describe_model(model: JanusModel, processor: Processor) -> dict[str, Any]:
    """Say what a runtime has to know of a model beside its graphs."""
    path, spec = model.generation, model.understanding.encoder.pixels
    return {
        "context": model.backbone.context,
        "hidden_size": model.backbone.hidden_size,
        "text_sampler": model.text_sampler,
        "image_sampler": model.image_sampler,
        "suppressed_ids": list(processor.suppressed_ids),
        "vocab_size": model.backbone.vocab_size,
        "pad_id": processor.pad_id,
        "sizes": dict(path.sizes),  # the generation path's own, whose names are its author's
        "image_target": {"height": path.height, "width": path.width, "positions": path.num_tokens},
        "image_input": {
            "height": spec.height,
            "width": spec.width,
            "positions": model.understanding.num_tokens,
        },
        "rows": {
            "guided": 2,  # rows that an image takes under guidance
            "order": "all conditional rows, then all unconditional",
            "unconditional": "the prompt with pads between its first and last token; they are seen",
        },
    }


def describe_graphs(graphs: Iterable[Graph]) -> dict[str, Any]:
    """Say what each graph takes and gives; axes that are known only at run time by name.

    A slot that ``varies`` has the dtype of the variant; what is written is that of the first.
    """
    return {
        graph.name: {
            "inputs": [_slot(slot) for slot in graph.inputs],
            "outputs": [_slot(slot) for slot in graph.outputs],
            "aliases": [list(pair) for pair in graph.aliases],
        }
        for graph in graphs
    }


def describe_axes(graphs: Iterable[Graph]) -> dict[str, Any]:
    """Say how large each axis may get."""
    axes = {
        axis.name: axis
        for graph in graphs
        for slot in (*graph.inputs, *graph.outputs)
        for axis in slot.shape
        if isinstance(axis, Axis)
    }
    return {name: {"min": a.min, "typical": a.typical, "max": a.max} for name, a in axes.items()}


def describe_cache(graphs: Iterable[Graph]) -> dict[str, Any]:
    """Say how keys and values are kept."""
    layers = next(len(graph.aliases) // 2 for graph in graphs if graph.name == "backbone")
    return {"form": "rows, heads, capacity, width", "layers": layers, "written": "in place, at write_index"}


def describe_rounding(rounding: Rounding, outcome: Outcome) -> dict[str, Any]:
    """Say how weights were quantised, which, and why others in the same graphs were not."""
    return {
        "bits": rounding.bits,
        "block_size": rounding.block_size,
        "form": rounding.form,
        "accuracy_level": rounding.accuracy_level if rounding.form == "nbits" else None,
        "graphs": list(outcome.graphs),
        "graph_bits": dict(outcome.graphs),
        "rounded": list(outcome.rounded),
        "weight_bits": {name: bits for name, bits in outcome.rounded.items() if bits != rounding.bits},
        "kept": dict(sorted(outcome.kept.items())),
    }


def compose_manifest(
    *,
    source: Mapping[str, Any],
    plugins: Iterable[Mapping[str, Any]],
    model: Mapping[str, Any],
    graphs: Iterable[Graph],
    variants: Mapping[str, Any],
    files: Mapping[str, tuple[str, int]],
) -> dict[str, Any]:
    """Put a manifest together; ``files`` are hashes and sizes."""
    graphs = list(graphs)
    manifest = {
        "schema": SCHEMA,
        "written_by": f"janus-modular {__version__}",
        "source": dict(source),
        "versions": versions(),
        "requires": {"onnxruntime": ONNX_RUNTIME},
        "plugins": [dict(one) for one in plugins],
        "model": dict(model),
        "variants": dict(variants),
        "modes": modes_of(graph.name for graph in graphs),
        "graphs": describe_graphs(graphs),
        "axes": describe_axes(graphs),
        "cache": describe_cache(graphs),
        "sha256": {name: digest for name, (digest, _) in sorted(files.items())},
        "bytes": {name: size for name, (_, size) in sorted(files.items())},
        "parity": {},
        "built": {},
        "executed": {},
    }
    return {**manifest, DIGESTS: {name: digest_of(manifest, name) for name in variants}}


def versions() -> dict[str, str]:
    """Name the versions of what writes graphs."""
    return {name: metadata.version(name) for name in RECORDED}


def _slot(slot: Slot) -> dict[str, Any]:
    return {
        "name": slot.name,
        "dtype": str(slot.dtype).removeprefix("torch."),
        "shape": [axis.name if isinstance(axis, Axis) else axis for axis in slot.shape],
        **({"varies": True} if slot.varies else {}),
    }
