"""Gates that run one graph at a time: results equal to torch's, and writes to the right cache positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from janus_export.bundle.contract import MAGNITUDE
from janus_export.errors import ExportError
from janus_export.reference.compare import CLOSE, compare_outputs, distance
from janus_export.reference.prompts import elongated_images, images
from janus_export.reference.recording import Array, GraphCall, Run
from janus_export.reference.target import CheckResult, Reference, VerificationTarget
from janus_export.runtimes.contract import ReadableCache, ReadsInChunks
from janus_export.runtimes.memory import Buffer, to_numbers
from janus_modular import GraphSpec, Runtime, TensorSpec
from janus_modular.graph_specs import GraphRole
from janus_modular.processing.image_transforms import encoder_inputs

CHUNK = 5  # positions of a prompt at once
INPUTS_FROM: dict[GraphRole, GraphRole] = {"encode": "decode", "embed": "encode"}
"""By role of a graph that a sampler need not run: the role whose outputs it takes, in order of need."""

IMAGES = 3  # of one size at once
POISON = 1e4  # written to masked positions; representable in half precision


def graphs(target: VerificationTarget) -> Iterator[CheckResult]:
    """Compare every graph except the backbone, on inputs recorded in a run of the model."""
    reference = target.reference
    runs = [reference.greedy[1], reference.sampled[1]] if target.has("text") else []
    runs += [reference.drawn[1]] if target.has("drawing") else []
    calls = readers(reference)
    for name in ("sample_text", *reference.graphs):
        calls[name] = [call for run in runs for call in run.calls_of(name)]
    declared = {name: graph for name, graph in reference.graphs.items() if name in target.bundle.graphs}
    calls |= derived_calls(reference, declared.values(), runs[-1].calls)
    for name in target.bundle.graphs:
        if name != "backbone":
            yield from compare_calls(target, name, calls.get(name, []), target.graph_runtime.run)


def readers(reference: Reference) -> dict[str, list[GraphCall]]:
    """Return calls of the graphs that read images and text, with torch's outputs."""
    model, spec = reference.model, reference.processor.pixels
    tokens = np.arange(2 * 7).reshape(2, 7) * 37 % model.backbone.vocab_size
    by_size: dict[tuple[int, ...], list[Array]] = {}
    for image in (*images(IMAGES), *elongated_images()):
        for pixels in encoder_inputs(image, spec):
            by_size.setdefault(pixels.shape, []).append(pixels)
    groups = [np.stack(pixels[:IMAGES]) for pixels in by_size.values()]
    with torch.no_grad():
        features = [model.understanding(torch.from_numpy(pixels)).numpy() for pixels in groups]
        embeddings = model.backbone.embed(torch.from_numpy(tokens)).numpy()
    return {
        "understand": [
            GraphCall("understand", (pixels,), (read,), 0)
            for pixels, read in zip(groups, features, strict=True)
        ],
        "embed": [GraphCall("embed", (tokens,), (embeddings,), 0)],
    }


def derived_calls(
    reference: Reference, graphs: Iterable[GraphSpec], calls: Iterable[GraphCall]
) -> dict[str, list[GraphCall]]:
    """Return a call of each graph that a sampler need not run, on outputs of ``calls``: see `INPUTS_FROM`.

    Raises:
        ExportError: no call returned what the graph takes.
    """
    known, graphs = list(calls), list(graphs)
    derived: dict[str, list[GraphCall]] = {}
    for role in INPUTS_FROM:
        for graph in (graph for graph in graphs if graph.role == role):
            call = _derived_call(reference, graph, known)
            derived[graph.name] = [call]
            known.append(call)
    return derived


@torch.no_grad()
def _derived_call(reference: Reference, graph: GraphSpec, calls: Iterable[GraphCall]) -> GraphCall:
    role = INPUTS_FROM[graph.role]
    sources = [name for name, source in reference.graphs.items() if source.role == role]
    values = [x for call in calls if call.graph in sources for x in call.outputs if fits(graph.inputs[0], x)]
    if len(graph.inputs) != 1 or not values:
        inputs = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in graph.inputs)
        raise ExportError(
            f"the graph '{graph.name}' has the role '{graph.role}', and no graph of the role '{role}' returns"
            f" what it takes: {inputs}"
        )
    result = graph.function(torch.from_numpy(values[-1]))
    outputs = result if isinstance(result, tuple) else (result,)
    return GraphCall(graph.name, (values[-1],), tuple(x.numpy() for x in outputs), 0)


def fits(spec: TensorSpec, array: Array) -> bool:
    """Return True if an array has the dtype and shape of a spec."""
    try:
        spec.measure(array.shape)
    except ValueError:
        return False
    return str(array.dtype) == spec.dtype


def compare_calls(
    target: VerificationTarget, name: str, calls: Sequence[GraphCall], run: Callable[..., Any]
) -> Iterator[CheckResult]:
    """Run a graph on the inputs of torch's calls by ``run(name, *inputs)``, and compare the outputs."""
    if not calls:
        yield CheckResult(name, False, "the sampler never runs it", "a call to compare")
        return
    specs = [
        spec
        for spec in target.bundle.contract(name, target.variant)["outputs"]
        if spec["name"] != MAGNITUDE  # which the runtime has checked
    ]
    got: list[Sequence[Array]] = []
    for call in calls:
        result = run(name, *call.inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        got.append([_as_numbers(x, spec["dtype"]) for x, spec in zip(outputs, specs, strict=True)])
    graph = target.reference.graphs.get(name)
    role: GraphRole | None = "sample" if name == "sample_text" else graph.role if graph else None
    names = [spec["name"] for spec in specs]
    shapes = [spec["shape"] for spec in specs]
    got, want = _by_vector(got, shapes), _by_vector([call.outputs for call in calls], shapes)
    precision, floats = target.precision_of(name), target.embeddings_of(name)
    yield from compare_outputs(name, role, names, precision, got, want, floats)


def _by_vector(
    calls: Iterable[Sequence[Array]], shapes: Sequence[Sequence[int | str]]
) -> list[Sequence[Array]]:
    """Return outputs of calls with their leading dynamic axes as one, whose lengths differ between calls."""
    dynamic = [len(list(takewhile(lambda size: isinstance(size, str), shape))) for shape in shapes]
    return [
        [x.reshape(-1, *x.shape[axes:]) if axes else x for x, axes in zip(outputs, dynamic, strict=True)]
        for outputs in calls
    ]


def _as_numbers(x: Array, dtype: str) -> Array:
    """Return an output as floats; bfloat16 arrives as uint16."""
    return to_numbers(x, dtype) if x.dtype == np.uint16 else x


def rows(target: VerificationTarget) -> Iterator[CheckResult]:
    """Run the backbone on torch's inputs: prompts of several lengths, in chunks too, single and idle rows."""
    if not target.is_exact:
        return
    answers, drawing = target.reference.greedy[1], target.reference.drawn[1]
    runtimes = {"": target.whole}
    if isinstance(target.whole, ReadsInChunks):
        runtimes[", in chunks, with a cache that grows"] = target.whole.in_chunks(CHUNK)
    for label, run in (("variable-length rows", answers), ("a drawing's rows", drawing)):
        for how, runtime in runtimes.items():
            yield from _states(f"{label}{how}", run, runtime)
    yield from _states("a row alone", answers.row(len(answers.prompts) - 1), target.whole)


def cache(target: VerificationTarget) -> Iterator[CheckResult]:
    """Check that unused cache positions do not affect results, and that a step writes only its own."""
    run = target.reference.greedy[1]
    first = np.zeros((len(run.prompts), 1), np.int64)
    x = target.graph_runtime.run("embed", first)[:, 0]
    clean, poisoned = _filled_session(target, run), _filled_session(target, run)
    for session in (clean, poisoned):
        session.prefill(run.prompts)
        session.kv_cache.reach(int(session.lengths.max()) + 1)
    if poisoned.has_states:
        yield _idle_states(clean, x)
    if not poisoned.kv_cache.tensors:
        return
    lengths = poisoned.lengths.copy()
    for tensor, buffer in _cache_tensors(poisoned):
        values = _positions_first(tensor, buffer)
        for row, length in enumerate(lengths):
            values[row, length:] = POISON
        buffer.write(np.moveaxis(values, 1, tensor.shape.index("capacity")))
    before = [_positions_first(*pair) for pair in _cache_tensors(poisoned)]
    same = bool((_one_step(clean, x) == _one_step(poisoned, x)).all())
    yield CheckResult(
        "unused cache positions", same, "no effect" if same else "they change the states", "no effect"
    )
    touched, written, rows = 0, True, np.arange(len(lengths))
    for old, (tensor, buffer) in zip(before, _cache_tensors(poisoned), strict=True):
        after = _positions_first(tensor, buffer)
        changed = (after != old).reshape(*after.shape[:2], -1).any(axis=2)  # (rows, capacity)
        changed[rows, lengths] = False
        touched += int(changed.sum())
        new = after[rows, lengths]
        written = written and bool((new != POISON).all() and np.isfinite(to_numbers(new, buffer.dtype)).all())
    yield CheckResult(
        "cache positions other than the written one", touched == 0, f"{touched} changed", "none changed"
    )
    yield CheckResult("the written cache position", written, "new" if written else "unchanged", "new")


def _idle_states(session: Any, x: Array) -> CheckResult:
    """Check that a step leaves the states of rows that keep nothing as they are, and changes the others'."""
    idle = np.arange(len(x)) % 2 == 0
    buffers = session.kv_cache.old_states.values()
    before = [buffer.read().copy() for buffer in buffers]
    session.step(x, ~idle)
    after = [buffer.read() for buffer in buffers]
    changed = sum(not np.array_equal(new[idle], old[idle]) for new, old in zip(after, before, strict=True))
    return CheckResult("states of idle rows", changed == 0, f"{changed} changed", "none changed")


def _filled_session(target: VerificationTarget, run: Run) -> Any:
    """Open a session with a readable cache: of the users' runtime if possible, else of ONNX Runtime."""
    session = target.whole.open(run.max_seq_len)
    return session if isinstance(session, ReadableCache) else target.runtime.open(run.max_seq_len)


def _one_step(session: Any, x: Array) -> Array:
    return session.to_host(session.step(x))


def _cache_tensors(session: Any) -> list[tuple[TensorSpec, Buffer]]:
    """Return the tensors of a session's cache that have an axis of positions, and their memory."""
    return [(tensor, session.kv_cache.buffers[tensor.name]) for tensor in session.kv_cache.tensors]


def _positions_first(tensor: TensorSpec, buffer: Buffer) -> Array:
    """Return a copy of a tensor of the cache with its positions as the second axis (rows, capacity, ...)."""
    return np.moveaxis(buffer.read().copy(), tensor.shape.index("capacity"), 1)


def _states(label: str, run: Run, runtime: Runtime) -> Iterator[CheckResult]:
    """Compare the states of a replayed run with torch's: after the first prompts, then all others."""
    off = [distance(got, read.states()) for got, read in zip(run.replay(runtime), run.reads, strict=True)]
    for part, distances in (("prompts", off[:1]), ("steps", off[1:])):
        if distances:
            measured = max(distances)
            yield CheckResult(f"{label}: {part}", measured <= CLOSE, f"{measured:.1e}", f"<= {CLOSE:.0e}")
