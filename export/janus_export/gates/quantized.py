"""Gates of variants that are rounded: fed what the model was fed, they must say nearly what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import torch

from janus_export.gates.graphs import replay
from janus_export.reference.compare import AGREEING, CLEAR, LEAST_CLEAR, agree, alike, magnitude
from janus_export.reference.recording import Array, Run
from janus_export.reference.target import Check, Subject
from janus_export.reference.upcast import widened
from janus_export.runtimes.ort.library import onnxruntime
from janus_export.runtimes.ort.runtime import quiet_options
from janus_export.runtimes.prompts import embed

HALF_MAX = 65504.0  # what float16 can hold; bfloat16 holds what float32 does
DRAWS = 4  # of every choice


def forced(subject: Subject) -> Iterator[Check]:
    """Compare what is said along torch's own answers and drawings (teacher forcing), step by step.

    Of a bundle that does only one of the two, that alone is compared.
    """
    if subject.is_exact:
        return
    for mode, what, run, compare in (
        ("text", "answers", subject.reference.greedy[1], compare_answers),
        ("drawing", "drawings", subject.reference.drawn[1], compare_drawing),
    ):
        if not subject.has(mode):
            continue
        got, want = (_states(run, states) for states in (replay(subject.whole, run), run.hidden))
        yield from compare(subject, what, got, want)


def _states(run: Run, states: list[Array]) -> Array:
    """Return the states (M, D) of rows that count."""
    return np.concatenate([state[run.active(step)] for step, state in enumerate(states)])


@torch.no_grad()
def compare_answers(subject: Subject, what: str, got: Array, want: Array) -> Iterator[Check]:
    """Compare the logits that torch makes of a graph's states (M, D), and of torch's."""
    kind, heads = subject.rounded_to, subject.reference.model.backbone
    one, other = (heads.logits(torch.from_numpy(states).float()).numpy() for states in (got, want))
    one, other = (logits - logits.mean(-1, keepdims=True) for logits in (one, other))
    yield alike(f"{what}: cosine of logits", kind, one, other)
    second, first = np.sort(other, axis=-1)[:, -2:].T
    clear = first - second >= CLEAR
    if clear.sum() < LEAST_CLEAR:
        return  # so few say nothing: the cosine alone decides
    share = float((one.argmax(-1) == other.argmax(-1))[clear].mean())
    found = f"{share:.1%} of {clear.sum()} clear choices of {len(clear)}"
    yield Check(f"{what}: likeliest choice", share >= AGREEING, found, f">= {AGREEING:.0%}")


@torch.no_grad()
def compare_drawing(subject: Subject, what: str, got: Array, want: Array) -> Iterator[Check]:
    """Compare a graph's states (M, D) with torch's, and what torch's own ``sample_image`` chooses after each.

    Choices are by chance, both with the same noise. How many differ says how far the two distributions are
    apart, whatever kind of head makes them, and also where none of the choices is clear.
    """
    kind, path = subject.rounded_to, subject.reference.model.generation
    yield alike(f"{what}: cosine of states", kind, got, want)
    choose, one, rng = path.parts()["sample_image"], torch.tensor(1.0), np.random.default_rng(0)
    chosen: list[list[Array]] = [[], []]
    for _ in range(DRAWS):
        noise = torch.from_numpy(rng.standard_exponential((len(want), path.sizes["codes"]), np.float32))
        for codes, states in zip(chosen, (got, want), strict=True):
            codes.append(choose(torch.from_numpy(states).float(), noise, one, one)[0].numpy())
    yield agree(f"{what}: choices with the same noise", kind, *map(np.concatenate, chosen))


def activations(subject: Subject) -> Iterator[Check]:
    """Look at every number inside a float16 backbone: none may come near what float16 cannot hold."""
    if subject.record["dtype"] != "float16":
        return
    largest, where = _largest(subject)
    found = f"{largest:.4g} at {where}"
    yield Check("largest number inside the backbone", largest < HALF_MAX, found, f"< {HALF_MAX:.0f}")


def _largest(subject: Subject) -> tuple[float, str]:
    """Run a drawing's prompts and answers' through a backbone that gives everything away, in float32."""
    names: list[str] = []
    with TemporaryDirectory() as aside:
        model = widened(ir.load(subject.runtime.bundle.path("backbone", subject.variant)))
        known = {value.name for value in model.graph.outputs}
        for node in model.graph:
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT and value.name and value.name not in known:
                    model.graph.outputs.append(value)
                    names.append(value.name)
        path = Path(aside) / "open.onnx"
        ir.save(model, path, external_data="open.data")
        session = onnxruntime.InferenceSession(str(path), quiet_options(), providers=["CPUExecutionProvider"])
        found: dict[str, float] = {}
        for run in (subject.reference.greedy[1], subject.reference.drawn[1]):
            feeds = _first_feed(subject, run)
            for name, value in zip(names, session.run(names, feeds), strict=True):
                found[name] = max(found.get(name, 0.0), magnitude(value))
    where = max(found, key=found.__getitem__)
    return found[where], where


def _first_feed(subject: Subject, run: Run) -> dict[str, Array]:
    """Return what the backbone is fed for prompts: embeddings from the same graphs, an empty cache."""
    x = embed(run.prompts, subject.runtime.run, images_at_once=4).astype(np.float32)
    rows, tokens, _ = x.shape
    at = np.tile(np.arange(tokens), (rows, 1))
    axes = {"rows": rows, "tokens": tokens, "capacity": tokens}
    feeds: dict[str, Array] = {
        "x": x,
        "positions": at,
        "mask": (np.arange(tokens) <= at[:, :, None])[:, None],
        "write_index": np.zeros(rows, np.int64),
    }
    for tensor in subject.runtime.graph("backbone").contract.inputs:
        if tensor.name not in feeds:
            feeds[tensor.name] = np.zeros(tensor.sized(axes), np.float32)
    return feeds
