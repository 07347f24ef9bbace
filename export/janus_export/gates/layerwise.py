"""Gates for models too large for float32 in memory: every graph alone, the backbone layer by layer.

Torch reads the weights of a layer when the layer runs, and the inputs of each layer are recorded for prompts
and for some steps. Each layer of the graph is run on the recorded input of torch's layer, and then all layers
one after the other. Memory never holds more than one layer, or one of the other graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from janus_export.bundle.contract import MAGNITUDE, GraphContract
from janus_export.errors import ExportError
from janus_export.gates.graphs import compare_calls, derived_calls, readers
from janus_export.gates.quantized import HALF_MAX, compare_drawing
from janus_export.reference.compare import compare, magnitude
from janus_export.reference.recording import Array, GraphCall, RecordingRuntime
from janus_export.reference.streamed import ForwardPass, StreamedReference
from janus_export.reference.subgraphs import cut
from janus_export.reference.target import CheckResult, VerificationTarget
from janus_export.reference.upcast import upcast
from janus_export.runtimes.kv_cache import host_inputs
from janus_export.runtimes.ort.library import onnxruntime
from janus_export.runtimes.ort.runtime import quiet_options
from janus_modular import GraphSpec

Arrays = dict[str, Array]

LARGE = 16 * 2**20
"""Bytes of a graph whose memory is freed at once; looking for it takes 0.2 s and more."""


def layers(target: VerificationTarget) -> Iterator[CheckResult]:
    """Run every layer of the backbone on the recorded input of torch's layer, then all layers in sequence."""
    reference = cast(StreamedReference, target.reference)
    path, stack = reference.stack
    passes, precision = reference.passes, target.backbone_precision
    capacity = int(passes[-1].index.max()) + 1
    # Of the manifest: ONNX Runtime would take memory for the whole graph, and has no bfloat16 on a processor.
    contract = GraphContract.declared("backbone", target.bundle.graphs["backbone"])
    model = ir.load(target.bundle.path("backbone", target.variant))
    is_float16 = target.record["dtype"] == "float16"
    known = [
        _graph_inputs(contract, forward, capacity) for forward in passes
    ]  # by pass: inputs that subgraphs may need
    largest, compared = (0.0, ""), 0
    for subgraph in cut(model, path, len(stack), stream="x", inside=is_float16):
        with IsolatedGraph(subgraph.model) as graph:
            if subgraph.layer is not None:
                compared += 1
                fed = [
                    {**inputs, subgraph.takes: forward.states[subgraph.layer]}
                    for inputs, forward in zip(known, passes, strict=True)
                ]
                alone = [outputs[subgraph.gives] for outputs in _run(contract, graph, fed, capacity)]
                yield _compare_layer(subgraph.layer, precision, alone, passes)
            for inputs, outputs in zip(known, _run(contract, graph, known, capacity), strict=True):
                largest = max(largest, *((_size(value), name) for name, value in outputs.items()))
                inputs.update({name: outputs[name] for name in subgraph.carries})
    declared = len(stack) if contract.states else target.bundle.manifest["cache"]["layers"]
    yield CheckResult("layers compared", compared == declared, str(compared), str(declared))
    if is_float16:
        measured = f"{largest[0]:.4g} at {largest[1]}"
        yield CheckResult(
            "largest number inside the backbone", largest[0] < HALF_MAX, measured, f"< {HALF_MAX:.0f}"
        )
    got, want = (
        np.concatenate([states[forward.counts] for states, forward in zip(of, passes, strict=True)])
        for of in ([inputs["hidden"] for inputs in known], [forward.hidden for forward in passes])
    )
    if precision == "exact":
        yield compare("all layers in turn", precision, got, want)
    else:
        yield from compare_drawing(target, "all layers in turn", got, want, reference.recorded[0])


def _graph_inputs(contract: GraphContract, forward: ForwardPass, capacity: int) -> Arrays:
    counts = forward.counts.sum(1)
    masks: dict[str, Any] = {"together": forward.together, "hidden": forward.unseen}
    inputs = host_inputs(contract, forward.index, forward.positions, counts, capacity=capacity, **masks)
    return {"x": forward.x, **inputs}


def _run(
    contract: GraphContract, graph: IsolatedGraph, inputs_by_pass: Sequence[Arrays], capacity: int
) -> list[Arrays]:
    """Run a subgraph on successive passes; its caches carry over from pass to pass."""
    axes = {"rows": len(inputs_by_pass[0]["x"]), "capacity": capacity}
    written = {**contract.aliases, **contract.states}
    pasts = set(written.values())
    caches = {
        tensor.name: np.zeros(tensor.sized(axes), np.float32)
        for tensor in contract.inputs
        if tensor.name in pasts
    }
    results = []
    for inputs in inputs_by_pass:
        outputs = graph.run(caches | inputs)
        caches |= {past: outputs[present] for present, past in written.items() if present in outputs}
        results.append(outputs)
    return results


def _compare_layer(
    layer: int, precision: str | int, got: Sequence[Array], passes: Sequence[ForwardPass]
) -> CheckResult:
    """Compare a layer's output; for quantised layers, output minus input, because the input is far larger."""
    inputs, want = (
        np.concatenate([forward.states[index][forward.counts] for forward in passes])
        for index in (layer, layer + 1)
    )
    states = np.concatenate([state[forward.counts] for state, forward in zip(got, passes, strict=True)])
    if precision == "exact":
        return compare(f"layer {layer}", precision, states, want)
    return compare(f"layer {layer}: residual update", precision, states - inputs, want - inputs)


@torch.no_grad()
def other_graphs(target: VerificationTarget) -> Iterator[CheckResult]:
    """Run every graph except the backbone separately, on torch's states."""
    reference = cast(StreamedReference, target.reference)
    model, rng, run = reference.model, np.random.default_rng(0), reference.recorded[0]
    session = RecordingRuntime(reference.janus.runtime)
    torchs = session.open(1)
    hidden = np.concatenate([forward.hidden[forward.counts] for forward in reference.passes])
    noise = rng.standard_exponential((len(hidden), model.backbone.vocab_size), np.float32)
    torchs.run("sample_text", hidden, noise, np.float32(1.2), np.int64(40), np.float32(0.9))
    calls = {**readers(reference), "sample_text": session.runs[-1].calls}
    graphs = reference.graphs.values()
    for graph in graphs:
        calls[graph.name] = run.calls_of(graph.name)
    # Graphs that the first steps of an image do not run: encoding noise pixels, and decoding the result.
    encoders = [graph for graph in graphs if graph.role == "encode"]
    for graph in graphs:
        if graph.role == "decode" and not calls[graph.name]:
            calls[graph.name] = [_decoding(graph, encoders, rng)]
    decoded = [call for graph in graphs if graph.role == "decode" for call in calls[graph.name]]
    calls |= derived_calls(reference, graphs, decoded)
    for name in target.bundle.graphs:
        if name == "backbone":
            continue
        with IsolatedGraph(ir.load(target.bundle.path(name, target.variant))) as isolated:
            yield from compare_calls(target, name, calls.get(name, []), isolated.outputs_of)


def _decoding(graph: GraphSpec, encoders: Sequence[GraphSpec], rng: np.random.Generator) -> GraphCall:
    """Return a call of a graph that decodes: ids that an encoder computes from noise, or floats of noise.

    Raises:
        ExportError: the graph decodes ids, and no graph encodes them.
    """
    axes = {"images": 2, "rows": 2}
    inputs: list[Tensor] = []
    for encoder in encoders:
        if [(spec.dtype, spec.shape) for spec in encoder.outputs] == [
            (spec.dtype, spec.shape) for spec in graph.inputs
        ]:
            noise = rng.integers(0, 256, encoder.inputs[0].sized(axes), np.uint8)
            result = encoder.function(torch.from_numpy(noise))
            inputs = list(result) if isinstance(result, tuple) else [result]
    if not inputs:
        if any(spec.dtype not in ("model", "float32") for spec in graph.inputs):
            raise ExportError(
                f"the graph '{graph.name}' decodes ids, and no graph of the role 'encode' makes them, so it"
                " cannot be verified alone. Verify the model as a whole, with more memory: --whole"
            )
        inputs = [
            torch.from_numpy(rng.standard_normal(spec.sized(axes), np.float32)) for spec in graph.inputs
        ]
    result = graph.function(*inputs)
    outputs = result if isinstance(result, tuple) else (result,)
    return GraphCall(graph.name, tuple(x.numpy() for x in inputs), tuple(x.numpy() for x in outputs), 0)


class IsolatedGraph:
    """A context manager that opens a graph on the CPU, in float32, with its weights in a separate file."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def __enter__(self) -> IsolatedGraph:
        """Write and open it."""
        self.folder = TemporaryDirectory()
        path = Path(self.folder.name) / "graph.onnx"
        ir.save(upcast(self.model), path, external_data="graph.data")
        self.session = onnxruntime.InferenceSession(
            str(path), quiet_options(), providers=["CPUExecutionProvider"]
        )
        self.inputs, self.outputs = (
            [tensor.name for tensor in tensors]
            for tensors in (self.session.get_inputs(), self.session.get_outputs())
        )
        return self

    def outputs_of(self, _: str, *inputs: Any) -> tuple[Array, ...]:
        """Run the graph on inputs in order; return the outputs without the magnitude of pixels."""
        outputs = self.run(dict(zip(self.inputs, map(np.asarray, inputs), strict=True)))
        return tuple(value for name, value in outputs.items() if name != MAGNITUDE)

    def run(self, inputs: Arrays) -> Arrays:
        """Run the graph on the entries of ``inputs`` that are its inputs."""
        results = self.session.run(self.outputs, {name: inputs[name] for name in self.inputs})
        # Copies, because the returned arrays are views that keep the session's memory alive.
        return {name: value.copy() for name, value in zip(self.outputs, results, strict=True)}

    def __exit__(self, *_: object) -> None:
        """Free a large session at once: it is in a reference cycle, and the next graph needs its memory."""
        del self.session
        if sum(file.stat().st_size for file in Path(self.folder.name).iterdir()) >= LARGE:
            gc.collect()
        self.folder.cleanup()


def _size(value: Array) -> float:
    return magnitude(value) if value.dtype == np.float32 else 0.0
