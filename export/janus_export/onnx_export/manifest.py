"""Composes the manifest of a bundle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from janus_export.bundle.bundle import ONNX_RUNTIME, SCHEMA
from janus_export.bundle.modes import modes_of
from janus_export.onnx_export.graphs import Graph
from janus_export.onnx_export.quantization import QuantizationSpec
from janus_export.onnx_export.quantize import Outcome
from janus_modular import EncodesImages, JanusModel, Processor, TensorSpec, __version__
from janus_modular.bundles import DIGESTS, describe_encoded, digest_of

RECORDED = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript")


def describe_model(model: JanusModel, processor: Processor) -> dict[str, Any]:
    """Return what a runtime needs to know about a model besides its graphs."""
    path, spec = model.generation, model.understanding.encoder.pixels
    return {
        "context": model.backbone.context,
        "hidden_size": model.backbone.hidden_size,
        "text_sampler": model.text_sampler,
        "image_sampler": model.image_sampler,
        "suppressed_ids": list(processor.suppressed_ids),
        "vocab_size": model.backbone.vocab_size,
        "pad_id": processor.pad_id,
        **({"together": list(model.config.together)} if model.config.together else {}),
        "sizes": dict(path.sizes),  # of the generation path, whose author chooses the names
        "image_target": {
            "height": path.height,
            "width": path.width,
            "positions": path.num_tokens,
            **({"encoded": describe_encoded(path.encoded)} if isinstance(path, EncodesImages) else {}),
        },
        "image_input": {
            "height": spec.height,
            "width": spec.width,
            "positions": model.understanding.num_tokens,
            **({} if spec.multiple is None else {"multiple": spec.multiple}),  # native sizes
        },
        "rows": {
            "guided": 2,  # rows that an image takes under guidance
            "order": "all conditional rows, then all unconditional",
            "unconditional": "the prompt with pads between its first and last token; they are seen",
        },
    }


def describe_graphs(graphs: Iterable[Graph]) -> dict[str, Any]:
    """Return each graph's inputs, outputs and role; dynamic axes by name.

    The dtype of a tensor that ``varies`` is the variant's; recorded is that of the first variant.
    """
    return {
        graph.name: {
            "inputs": [_describe_tensor(graph, spec) for spec in graph.inputs],
            "outputs": [_describe_tensor(graph, spec) for spec in graph.outputs],
            "aliases": [list(pair) for pair in graph.aliases],
            **({"states": [list(pair) for pair in graph.states]} if graph.states else {}),
            **({"role": graph.role} if graph.role else {}),
        }
        for graph in graphs
    }


def describe_axes(graphs: Sequence[Graph]) -> dict[str, Any]:
    """Return the range of each axis in the shapes of these graphs, and of a session's capacity."""
    axes = {
        name: graph.ranges.axis(name)
        for graph in graphs
        for spec in (*graph.inputs, *graph.outputs)
        for name in spec.axes
    }
    axes.update({graph.ranges.capacity.name: graph.ranges.capacity for graph in graphs})
    return {name: {"min": a.min, "typical": a.typical, "max": a.max} for name, a in axes.items()}


def describe_cache(graphs: Iterable[Graph]) -> dict[str, Any]:
    """Return how the cache is stored: keys and values, and the states of recurrent layers."""
    backbone = next(graph for graph in graphs if graph.name == "backbone")
    states = {"states": [past for _, past in backbone.states]} if backbone.states else {}
    return {
        "form": "rows, heads, capacity, head_dim",
        "layers": len(backbone.aliases) // 2,
        "written": "in place, at write_index",
        **states,
    }


def describe_quantization(quantization: QuantizationSpec, outcome: Outcome) -> dict[str, Any]:
    """Return how weights were quantised, which ones, and why others in the same graphs were not."""
    return {
        "bits": quantization.bits,
        "block_size": quantization.block_size,
        "form": quantization.form,
        "accuracy_level": quantization.accuracy_level if quantization.form == "nbits" else None,
        "graphs": list(outcome.graphs),
        "graph_bits": dict(outcome.graphs),
        "quantized": list(outcome.quantized),
        "weight_bits": {name: bits for name, bits in outcome.quantized.items() if bits != quantization.bits},
        "skipped": dict(sorted(outcome.skipped.items())),
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
    """Return a whole manifest; ``files`` are hashes and sizes."""
    graphs = list(graphs)
    records = describe_graphs(graphs)
    manifest = {
        "schema": SCHEMA,
        "written_by": f"janus-modular {__version__}",
        "source": dict(source),
        "versions": versions(),
        "requires": {"onnxruntime": ONNX_RUNTIME},
        "plugins": [dict(plugin) for plugin in plugins],
        "model": dict(model),
        "variants": dict(variants),
        "modes": modes_of(records),
        "graphs": records,
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
    """Return the versions of the packages that write graphs."""
    return {name: metadata.version(name) for name in RECORDED}


def _describe_tensor(graph: Graph, spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": str(graph.torch_dtype(spec)).removeprefix("torch."),
        "shape": list(spec.shape),
        **({"varies": True} if spec.dtype == "model" else {}),
    }
