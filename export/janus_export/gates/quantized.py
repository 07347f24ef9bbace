"""Gates of half-precision and quantised variants: on the model's inputs, results must be close to its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from janus_export.bundle.contract import GraphContract
from janus_export.reference.compare import (
    AGREEING,
    CLEAR_MARGIN,
    LEAST_CLEAR,
    compare,
    compare_directions,
    magnitude,
)
from janus_export.reference.recording import Array, GraphCall, Run
from janus_export.reference.target import CheckResult, VerificationTarget
from janus_export.reference.upcast import upcast
from janus_export.runtimes.kv_cache import axes_of_positions, host_inputs
from janus_export.runtimes.ort.library import onnxruntime
from janus_export.runtimes.ort.runtime import quiet_options
from janus_export.runtimes.prompts import embed
from janus_modular.positions import RowPositions

HALF_MAX = 65504.0  # what float16 can hold; bfloat16 holds what float32 does
ENOUGH_CHOICES = 1000  # enough to estimate a share


def teacher_forced(target: VerificationTarget) -> Iterator[CheckResult]:
    """Compare each step along torch's own answers and drawings (teacher forcing).

    If a bundle supports only one of the two, only that one is compared.
    """
    if target.is_exact:
        return
    reference = target.reference
    if target.has("text"):
        run = reference.greedy[1]
        yield from compare_answers(target, "answers", *_states(target, run))
    if target.has("drawing"):
        run = reference.unguided
        yield from compare_drawing(target, "drawings", *_states(target, run), run)


def _states(target: VerificationTarget, run: Run) -> tuple[Array, Array]:
    """Return the defined states (M, D) along a run: of the variant, and of torch."""
    return np.concatenate(run.replay(target.whole)), np.concatenate([read.states() for read in run.reads])


@torch.no_grad()
def compare_answers(target: VerificationTarget, label: str, got: Array, want: Array) -> Iterator[CheckResult]:
    """Compare torch's logits of a graph's states (M, D) with those of torch's states."""
    precision, heads = target.backbone_precision, target.reference.model.backbone
    actual, expected = (heads.logits(torch.from_numpy(states).float()).numpy() for states in (got, want))
    actual, expected = (logits - logits.mean(-1, keepdims=True) for logits in (actual, expected))
    yield compare_directions(f"{label}: cosine of logits", precision, actual, expected)
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    clear = first - second >= CLEAR_MARGIN
    if clear.sum() < LEAST_CLEAR:
        return  # too few to estimate a share: only the cosine decides
    share = float((actual.argmax(-1) == expected.argmax(-1))[clear].mean())
    measured = f"{share:.1%} of {clear.sum()} clear choices of {len(clear)}"
    yield CheckResult(f"{label}: most likely token", share >= AGREEING, measured, f">= {AGREEING:.0%}")


@torch.no_grad()
def compare_drawing(
    target: VerificationTarget, label: str, got: Array, want: Array, run: Run
) -> Iterator[CheckResult]:
    """Compare a graph's states (M, D) with torch's, and the ids that torch's graphs sample from both.

    Both are sampled with the same noise, the inputs of ``run``. The share of different ids measures the
    distance of the two distributions, for any kind of head, and also where no id is clearly the most likely.
    """
    precision, graphs = target.backbone_precision, target.reference.graphs
    yield compare_directions(f"{label}: cosine of states", precision, got, want)
    ids: list[list[Array]] = [[], []]
    for call in run.calls_of(*(name for name, graph in graphs.items() if graph.role == "sample")):
        index = _states_input(call, run)
        if index is None:
            continue  # it takes no states of the backbone
        rows = len(call.inputs[index])
        for chosen, states in zip(ids, (got, want), strict=True):
            for start in range(0, len(states) - rows + 1, rows):
                inputs = list(map(torch.from_numpy, call.inputs))
                inputs[index] = torch.from_numpy(states[start : start + rows]).float()
                result = graphs[call.graph].function(*inputs)
                outputs = result if isinstance(result, tuple) else (result,)
                chosen += [x.numpy().ravel() for x in outputs if x.dtype == torch.int64]
        if sum(map(len, ids[0])) >= ENOUGH_CHOICES:
            break
    if ids[0]:
        yield compare(f"{label}: choices with the same noise", precision, *map(np.concatenate, ids))


def _states_input(call: GraphCall, run: Run) -> int | None:
    """Return the number of the input that holds states of the backbone: of the last call, or some of them."""
    read = run.read_before(call)
    states = read.states() if read else np.zeros((0, 0))
    for index, x in enumerate(call.inputs):
        if x.ndim == 2 and x.shape[1] == states.shape[1] and (states == x[0]).all(1).any():
            return index
    return None


def activations(target: VerificationTarget) -> Iterator[CheckResult]:
    """Check every activation of a float16 backbone: none may come near the limit of float16."""
    if target.record["dtype"] != "float16":
        return
    largest, where = _largest(target)
    measured = f"{largest:.4g} at {where}"
    yield CheckResult("largest number inside the backbone", largest < HALF_MAX, measured, f"< {HALF_MAX:.0f}")


def _largest(target: VerificationTarget) -> tuple[float, str]:
    """Run the prompts of drawings and answers through a float32 backbone that outputs all activations."""
    names: list[str] = []
    with TemporaryDirectory() as temporary:
        model = upcast(ir.load(target.runtime.bundle.path("backbone", target.variant)))
        known = {value.name for value in model.graph.outputs}
        for node in model.graph:
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT and value.name and value.name not in known:
                    model.graph.outputs.append(value)
                    names.append(value.name)
        path = Path(temporary) / "open.onnx"
        ir.save(model, path, external_data="open.data")
        session = onnxruntime.InferenceSession(str(path), quiet_options(), providers=["CPUExecutionProvider"])
        magnitudes: dict[str, float] = {}
        reference = target.reference
        runs = [reference.greedy[1]] if target.has("text") else []
        runs += [reference.drawn[1]] if target.has("drawing") else []
        for run in runs:
            inputs = _first_inputs(target, run)
            for name, value in zip(names, session.run(names, inputs), strict=True):
                magnitudes[name] = max(magnitudes.get(name, 0.0), magnitude(value))
    where = max(magnitudes, key=magnitudes.__getitem__)
    return magnitudes[where], where


def _first_inputs(target: VerificationTarget, run: Run) -> dict[str, Array]:
    """Return the backbone's inputs for prompts: embeddings from the same graphs, and an empty cache."""
    x = embed(run.prompts, target.runtime.run, images_at_once=4, graphs={}).astype(np.float32)
    rows, tokens, _ = x.shape
    contract = GraphContract.declared("backbone", target.bundle.graphs["backbone"])
    axes = {"rows": rows, "tokens": tokens, "capacity": tokens}
    counts = np.array([len(prompt) for prompt in run.prompts])
    index = np.tile(np.arange(tokens), (rows, 1))
    ids = axes_of_positions(target.bundle.graphs["backbone"]["inputs"])
    rows_read = RowPositions.of_prompts(ids, run.prompts)
    masks: dict[str, Any] = {"together": rows_read.blocks, "hidden": rows_read.hidden_in()}
    inputs: dict[str, Array] = {
        "x": x,
        **host_inputs(contract, index, rows_read.of(index), counts, capacity=tokens, **masks),
    }
    for tensor in contract.inputs:
        if tensor.name not in inputs:
            inputs[tensor.name] = np.zeros(tensor.sized(axes), np.float32)
    return inputs
