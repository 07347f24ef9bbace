"""Gates that run one graph at a time: torch's numbers, and a cache written where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from janus_export.bundle.contract import MAGNITUDE
from janus_export.reference.compare import CLOSE, compare_part, distance
from janus_export.reference.prompts import images
from janus_export.reference.recording import Array, Run
from janus_export.reference.target import Check, Subject
from janus_export.runtimes.memory import to_numbers
from janus_modular import ImageInput, Message, Runtime

SMALL = {"chunk": 5, "bucket": 8}  # positions of a prompt at once, slots that a cache grows by
POISON = 1e4  # in slots that nobody may see; small enough for half precision


def graphs(subject: Subject) -> Iterator[Check]:
    """Compare every graph beside the backbone, on inputs that a run of the model gave it."""
    model, processor, reference = subject.reference.model, subject.reference.processor, subject.reference
    prompt = processor.chat_prompt([Message("user", [*map(ImageInput, images(3))])])
    pixels = np.stack(prompt.understanding_pixels)
    tokens = np.arange(2 * 7).reshape(2, 7) * 37 % model.backbone.vocab_size
    drawn = reference.drawn[1]
    [(_, (codes,), (painted,))] = [one for one in drawn.parts if one[0] == "decode_image"]
    with torch.no_grad():
        asked: dict[str, list[tuple[tuple[Any, ...], tuple[Array, ...]]]] = {  # inputs, and torch's outputs
            "understand": [((pixels,), (model.understanding(torch.from_numpy(pixels)).numpy(),))],
            "embed": [((tokens,), (model.backbone.embed(torch.from_numpy(tokens)).numpy(),))],
            "decode_image": [((codes,), (painted,))],
            "tokenize_image": [
                ((painted,), (model.generation.targets(torch.from_numpy(painted), ()).numpy(),))
            ],
        }
    for name in ("sample_text", "sample_image"):
        runs = (reference.greedy[1], reference.sampled[1], drawn)
        asked[name] = [(given, said) for run in runs for part, given, said in run.parts if part == name]
    for name, calls in ((name, calls) for name, calls in asked.items() if name in subject.bundle.graphs):
        got = [_outputs(subject, name, given) for given, _ in calls]
        want = [one for _, one in calls]
        yield from compare_part(name, subject.kind_of(name), got, want, subject.embeddings_of(name))


def _outputs(subject: Subject, name: str, given: tuple[Any, ...]) -> tuple[Array, ...]:
    """Run a graph; return its outputs as numbers, bfloat16 too."""
    made = subject.parts.run(name, *given)
    outputs = subject.bundle.contract(name, subject.variant)["outputs"]
    slots = [slot for slot in outputs if slot["name"] != MAGNITUDE]  # which the runtime has checked
    return tuple(
        to_numbers(one, slot["dtype"]) if one.dtype == np.uint16 else one
        for one, slot in zip(made if isinstance(made, tuple) else (made,), slots, strict=True)
    )


def rows(subject: Subject) -> Iterator[Check]:
    """Feed the backbone what torch's was fed: whole and in chunks, ragged and alone, with rows that pause."""
    if not subject.is_exact:
        return
    answers, drawing = subject.reference.greedy[1], subject.reference.drawn[1]
    runtimes = {"": subject.whole}
    if hasattr(getattr(subject.whole, "config", None), "chunk"):
        runtimes[", in chunks, with a cache that grows"] = in_chunks(subject.whole)
    for what, run in (("ragged rows", answers), ("a drawing's rows", drawing)):
        for how, runtime in runtimes.items():
            states = replay(runtime, run)
            yield _states(f"{what}{how}: prompts", states[:1], run)
            yield _states(f"{what}{how}: steps", states[1:], run, start=1)
    alone = alone_in(answers, len(answers.prompts) - 1)
    yield _states("a row alone", replay(subject.whole, alone), alone)


def in_chunks(runtime: Any) -> Runtime:
    """Return a runtime that reads prompts in small chunks, over the same opened graphs."""
    smaller = {name: size for name, size in SMALL.items() if hasattr(runtime.config, name)}
    other = copy(runtime)
    other.config = replace(runtime.config, **smaller)
    return other


def cache(subject: Subject) -> Iterator[Check]:
    """Check that slots which no row has reached change nothing, and that a step writes its own slot alone."""
    run = subject.reference.greedy[1]
    x = run.fed[0][0]
    clean, poisoned = _with_slots(subject, run), _with_slots(subject, run)
    for session in (clean, poisoned):
        session.prefill(run.prompts)
        session.kv_cache.reach(int(session.lengths.max()) + 1)
    lengths = poisoned.lengths.copy()
    for buffer in poisoned.kv_cache.buffers.values():
        values = buffer.read().copy()
        for row, length in enumerate(lengths):
            values[row, :, length:] = POISON
        buffer.write(values)
    before = _slots(poisoned)
    same = bool((_one_step(clean, x) == _one_step(poisoned, x)).all())
    yield Check("unseen slots", same, "no effect" if same else "they change the states", "no effect")
    touched = 0
    for name, after in _slots(poisoned).items():
        changed = (after != before[name]).any(axis=(1, 3))  # (rows, slots)
        changed[np.arange(len(lengths)), lengths] = False
        touched += int(changed.sum())
    yield Check("slots beside the one that is written", touched == 0, f"{touched} changed", "none changed")
    written = all(
        (after[r, :, n] != POISON).all() and np.isfinite(to_numbers(after[r, :, n], dtype)).all()
        for after, dtype in _written(poisoned)
        for r, n in enumerate(lengths)
    )
    yield Check("the slot that is written", written, "new" if written else "left as it was", "new")


def _with_slots(subject: Subject, run: Run) -> Any:
    """Open a session whose cache can be looked at: of what users run, if it lets one."""
    session = subject.whole.open(_room(run))
    return session if hasattr(session, "kv_cache") else subject.runtime.open(_room(run))


def _one_step(session: Any, x: Array) -> Array:
    return session.to_host(session.step(x))


def _slots(session: Any) -> dict[str, Array]:
    return {name: buffer.read().copy() for name, buffer in session.kv_cache.buffers.items()}


def _written(session: Any) -> list[tuple[Array, str]]:
    return [(buffer.read(), buffer.dtype) for buffer in session.kv_cache.buffers.values()]


def replay(runtime: Runtime, run: Run) -> list[Array]:
    """Feed a runtime what another was fed; return the states (R, D) after the prompts and every step."""
    session = runtime.open(_room(run))
    states = [session.to_host(session.prefill(run.prompts)).astype(np.float32)]
    for x, active in run.fed:
        states.append(session.to_host(session.step(x, active)).astype(np.float32))
    return states


def alone_in(run: Run, row: int) -> Run:
    """Return what one row of a run was fed and said, as if it had been alone."""
    steps = [i for i in range(len(run.fed)) if run.active(i + 1)[row]]
    return Run(
        prompts=[run.prompts[row]],
        fed=[(run.fed[i][0][row : row + 1], None) for i in steps],
        hidden=[run.hidden[0][row : row + 1], *(run.hidden[i + 1][row : row + 1] for i in steps)],
    )


def _room(run: Run) -> int:
    return max(map(len, run.prompts)) + len(run.fed) + 1


def _states(what: str, got: list[Array], run: Run, start: int = 0) -> Check:
    pairs = [
        (state[run.active(step)], run.hidden[step][run.active(step)]) for step, state in enumerate(got, start)
    ]
    off = max(distance(one, want) for one, want in pairs)
    return Check(what, off <= CLOSE, f"{off:.1e}", f"<= {CLOSE:.0e}")
