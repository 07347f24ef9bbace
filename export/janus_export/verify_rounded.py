"""Gates of variants that are rounded: fed what the model was fed, they must say nearly what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from janus_export.runtimes.onnx_runtime import ERRORS
from janus_export.verify_numbers import replay
from janus_export.verify_subject import Array, Check, Run, Subject

COSINES: dict[str | int, float] = {"half": 0.999, 8: 0.99}
"""Least cosine between logits, by how a variant is rounded."""

AGREEING = 0.9  # of the likeliest choices, where the model's is clear, in 4 bits
CLEAR = 1.0  # nats by which the likeliest leads the second
HALF_MAX = 65504.0  # what float16 can hold; bfloat16 holds what float32 does


def forced(subject: Subject) -> Iterator[Check]:
    """Compare logits along torch's own answers and drawings (teacher forcing), step by step."""
    if subject.is_exact:
        return
    for what, run in (("answers", subject.reference.greedy[1]), ("drawings", subject.reference.drawn[1])):
        got, want = (_states(run, states) for states in (replay(subject.whole, run), run.hidden))
        words = run.parts[0][0] == "text_next"
        yield compare_logits(subject, what, got, want, words=words)


def _states(run: Run, states: list[Array]) -> Array:
    """Return the states (M, D) of rows that count."""
    return np.concatenate([state[run.active(step)] for step, state in enumerate(states)])


def compare_logits(subject: Subject, what: str, got: Array, want: Array, *, words: bool) -> Check:
    """Compare what torch's own head makes of a graph's states (M, D), and of torch's."""
    one, other = (_logits(subject, states, words=words) for states in (got, want))
    cosine = float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))  # over the whole run
    if (least := COSINES.get(subject.rounded_to)) is not None:
        steps = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
        found = f"{cosine:.5f}; of single steps {steps.min():.5f} or more"
        return Check(f"{what}: cosine of logits", cosine >= least, found, f">= {least}")
    second, first = np.sort(other, axis=-1)[:, -2:].T
    clear = first - second >= CLEAR
    share = float((one.argmax(-1) == other.argmax(-1))[clear].mean()) if clear.any() else 1.0
    found = f"{share:.1%} of {clear.sum()} clear choices of {len(clear)}; cosine {cosine:.4f}"
    return Check(f"{what}: likeliest choice", share >= AGREEING, found, f">= {AGREEING:.0%}")


@torch.no_grad()
def _logits(subject: Subject, states: Array, *, words: bool) -> Array:
    """Turn states (M, D) into centred logits (M, V), by torch's own heads."""
    model, hidden = subject.reference.model, torch.from_numpy(states).float()
    if words:
        logits = model.backbone.logits(hidden)
    elif hasattr(model.generation, "head"):  # of a position's first code, before which none is known
        logits = model.generation.head(hidden, torch.empty(len(hidden), 0, dtype=torch.int64))
    else:
        logits = hidden
    return (logits - logits.mean(-1, keepdim=True)).numpy()


def activations(subject: Subject) -> Iterator[Check]:
    """Look at every number inside a float16 backbone: none may come near what float16 cannot hold."""
    if subject.record["dtype"] != "float16":
        return
    largest, where = _largest(subject)
    found = f"{largest:.4g} at {where}"
    yield Check("largest number inside the backbone", largest < HALF_MAX, found, f"< {HALF_MAX:.0f}")


def _largest(subject: Subject) -> tuple[float, str]:
    """Run a drawing's prompts and answers' through a backbone that gives everything away."""
    names: list[str] = []
    with TemporaryDirectory() as aside:
        model = ir.load(subject.runtime.bundle.path("backbone", subject.variant))
        known = {value.name for value in model.graph.outputs}
        for node in model.graph:
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT and value.name and value.name not in known:
                    model.graph.outputs.append(value)
                    names.append(value.name)
        path = Path(aside) / "open.onnx"
        ir.save(model, path, external_data="open.data")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS  # caches are copied here, which it would warn of
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found: dict[str, float] = {}
        for run in (subject.reference.greedy[1], subject.reference.drawn[1]):
            feeds = _first_feed(subject, run)
            for name, value in zip(names, session.run(names, feeds), strict=True):
                found[name] = max(found.get(name, 0.0), float(np.abs(value).max(initial=0.0)))
    where = max(found, key=lambda name: found[name] if np.isfinite(found[name]) else np.inf)
    return found[where] if np.isfinite(found[where]) else float("inf"), where


def _first_feed(subject: Subject, run: Run) -> dict[str, Array]:
    """Return what the backbone is fed for prompts: embeddings from the same graphs, an empty cache."""
    from janus_export.runtimes.prompts import embed

    x = embed(run.prompts, subject.runtime.run, pictures_at_once=4)
    rows, tokens, _ = x.shape
    at = np.tile(np.arange(tokens), (rows, 1))
    axes = {"rows": rows, "tokens": tokens, "capacity": tokens}
    feeds = {
        "x": x,
        "positions": at,
        "mask": (np.arange(tokens) <= at[:, :, None])[:, None],
        "write_index": np.zeros(rows, np.int64),
    }
    for tensor in subject.runtime.graph("backbone").contract.inputs:
        if tensor.name not in feeds:
            feeds[tensor.name] = np.zeros(tensor.sized(axes), np.float32)
    return feeds
