"""Gates that only read files: valid ONNX, the rules that runtimes rely on, the model's sizes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

import onnx
import onnx_ir as ir
from safetensors import safe_open

from janus_export.bundle.bundle import Bundle, graph_problems
from janus_export.bundle.external_data import references
from janus_export.onnx_export.graphs import understand_tensors
from janus_export.onnx_export.kv_cache import cache_tensors
from janus_export.onnx_export.weights import is_finite
from janus_export.reference.target import CheckResult, VerificationTarget
from janus_modular import EncodesImages
from janus_modular.bundles import describe_encoded

STANDARD = ("", "ai.onnx")
BEYOND = {"nbits": {("com.microsoft", "MatMulNBits"), ("com.microsoft", "GatherBlockQuantized")}}
"""Non-standard operators that a variant may use, by its quantisation form."""

MASK, PAST_KEY, PRESENT_KEY = 3, 4, 1  # indices in Attention's inputs and outputs


def checker(target: VerificationTarget) -> Iterator[CheckResult]:
    """Check every graph with ONNX' own checker, which infers the shapes inside."""
    for name, file in target.record["files"].items():
        try:
            with _without_links(target.bundle, file) as path:
                onnx.checker.check_model(path, full_check=True)
            result = "valid"
        except Exception as error:  # the checker raises errors of its own, and of protocol buffers
            result = shorten(str(error).strip().split("\n")[0], 300, placeholder=" ...")
        yield CheckResult(name, result == "valid", result, "valid")


@contextmanager
def _without_links(bundle: Bundle, file: str) -> Iterator[Path]:
    """Copy a graph into a folder where its external data are empty (sparse) files of the same sizes.

    ONNX's checker rejects data behind symbolic or hard links, which are common in hub caches and on
    deduplicated disks. It does not read weights, and only checks that the files exist and are large enough.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, Path(file).name)
        copyfile(bundle.folder / file, path)
        for location in {reference.location for reference in references(path)}:
            target = Path(folder, location)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
            os.truncate(target, (bundle.folder / location).stat().st_size)
        yield path


def lint(target: VerificationTarget) -> Iterator[CheckResult]:
    """Check for constructs that runtimes reject, or silently compute differently than intended."""
    own = {**target.bundle.manifest, "variants": {target.variant: target.record}}
    yield _none("differences between manifest and graphs", set(graph_problems(target.bundle.folder, own)))
    yield _none("weights that are not finite", set(_not_finite(target)))
    quantization = target.record["quantization"] or {}
    allowed = BEYOND.get(quantization.get("form", ""), set())
    for name, file in target.record["files"].items():
        graph = ir.load(target.bundle.folder / file).graph
        yield _none(
            f"{name}: non-standard operators",
            {
                f"{n.domain}::{n.op_type}"
                for n in graph
                if n.domain not in STANDARD and (n.domain, n.op_type) not in allowed
            },
        )
        yield _none(
            f"{name}: unused inputs",
            {str(i.name) for i in graph.inputs if not i.uses() and not i.is_graph_output()},
        )
        declared = target.bundle.graphs[name]
        for side, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
            got = [value.name for value in values]
            want = [tensor["name"] for tensor in declared[side]]
            yield CheckResult(f"{name}: {side}", got == want, ", ".join(map(str, got)), ", ".join(want))
        if declared["aliases"]:
            yield from _caches(graph, declared)
            yield _none(f"{name}: attention without an explicit mask", set(_unmasked(graph)))
        if name in quantization.get("graphs", ()):
            kept = set(quantization["skipped"])
            unquantized = {weight for weight in _matrices(graph) if weight not in kept}
            yield _none(f"{name}: unquantised matrices without a recorded reason", unquantized)


def _not_finite(target: VerificationTarget) -> Iterator[str]:
    """Name the weights with NaN or infinite values, in every file that the variant uses."""
    for file in target.record["weights"]:
        with safe_open(target.bundle.folder / file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # it is no mapping
                if not is_finite(weights.get_tensor(name)):
                    yield name


def _caches(graph: ir.Graph, declared: Mapping[str, Any]) -> Iterator[CheckResult]:
    """Check that each cache output is its input, written by TensorScatter along the axis of positions."""
    problems = set()
    outputs = {value.name: value for value in graph.outputs}
    inputs = {value.name: value for value in graph.inputs}
    shapes = {tensor["name"]: tensor["shape"] for tensor in declared["inputs"]}
    for present, past in declared["aliases"]:
        new, old = outputs.get(present), inputs.get(past)
        if new is None or old is None:
            problems.add(f"{present} or {past} is missing")
            continue
        shape, node = shapes[past], new.producer()
        if node is None or node.op_type != "TensorScatter" or node.inputs[0] is not old:
            problems.add(f"{present} is not written by TensorScatter from {past}")
        elif node.attributes.get_int("axis", -2) != shape.index("capacity"):
            problems.add(f"{present} is written along another axis than its positions")
        problems |= {
            f"{value.name} has {len(value.shape or ())} dimensions"
            for value in (old, new)
            if len(value.shape or ()) != len(shape)
        }
    yield _none("caches", problems)


def _unmasked(graph: ir.Graph) -> Iterator[str]:
    """Name attention nodes without an explicit mask, with their own causal mask, or with their own cache."""
    for node in graph:
        if node.op_type != "Attention":
            continue
        present = [value is not None for value in node.inputs]
        if len(present) <= MASK or not present[MASK]:
            yield f"{node.name} has no mask"
        if any(present[PAST_KEY:]):
            yield f"{node.name} takes a past"
        if any(value.name for value in node.outputs[PRESENT_KEY:]):
            yield f"{node.name} has {len(node.outputs)} outputs"
        if node.attributes.get_int("is_causal", 0):
            yield f"{node.name} has is_causal set"


def _matrices(graph: ir.Graph) -> Iterator[str]:
    """Name the weights of linear layers that are floating point."""
    for node in graph:
        if node.op_type not in ("Gemm", "MatMul"):
            continue
        for value in map(_upcast_from, node.inputs):
            if value is not None and value.is_initializer() and value.name and len(value.shape or ()) == 2:
                yield value.name.removeprefix("model.")


def _upcast_from(value: ir.Value | None) -> ir.Value | None:
    """Return the input of the Cast that computes a value; the value itself if no Cast computes it."""
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Cast" else value


def sizes(target: VerificationTarget) -> Iterator[CheckResult]:
    """Compare the manifest with the model's config."""
    model, processor = target.reference.model, target.reference.processor
    path = model.generation
    image_target: dict[str, Any] = {"height": path.height, "width": path.width, "positions": path.num_tokens}
    if isinstance(path, EncodesImages) and "encoded" in target.bundle.manifest["model"]["image_target"]:
        image_target["encoded"] = describe_encoded(path.encoded)  # which bundles of earlier versions lack
    expected = {
        "context": model.backbone.context,
        "hidden_size": model.backbone.hidden_size,
        "vocab_size": model.backbone.vocab_size,
        "image_target": image_target,
        "pad_id": processor.pad_id,
        "suppressed_ids": list(processor.suppressed_ids),
        "text_sampler": model.text_sampler,
        "image_sampler": model.image_sampler,
        "sizes": dict(path.sizes),
    }
    for name, size in expected.items():
        actual = target.bundle.manifest["model"].get(name)
        yield CheckResult(name, actual == size, str(actual), str(size))
    shapes = {
        f"{graph}.{tensor['name']}": [size for size in tensor["shape"] if not isinstance(size, str)]
        for graph, record in target.bundle.graphs.items()
        for tensor in (*record["inputs"], *record["outputs"])
    }
    inputs, outputs = understand_tensors(model)
    fixed = {
        f"understand.{tensor.name}": [size for size in tensor.shape if not isinstance(size, str)]
        for tensor in (*inputs, *outputs)
    }
    for graph in path.graphs():
        for tensor in (*graph.inputs, *graph.outputs):
            sizes = [size for size in tensor.shape if not isinstance(size, str)]
            fixed[f"{graph.name}.{tensor.name}"] = sizes
    tensors = cache_tensors(model.backbone)
    for tensor in tensors:
        fixed[f"backbone.past_{tensor.name}"] = [size for size in tensor.shape if not isinstance(size, str)]
    for name, want in fixed.items():
        if name.partition(".")[0] not in target.bundle.graphs:
            continue
        got = shapes.get(name)
        yield CheckResult(name, got == want, str(got), str(want))
    layers = target.bundle.manifest["cache"]["layers"]
    expected_layers = sum("capacity" in tensor.shape for tensor in tensors) // 2
    yield CheckResult("layers", layers == expected_layers, str(layers), str(expected_layers))


def _none(label: str, problems: set[str]) -> CheckResult:
    return CheckResult(label, not problems, ", ".join(sorted(problems)[:5]) or "none", "none")
