"""Gates for models too large for float32 in memory: every part alone, the backbone layer by layer.

Torch reads its weights as it goes, and what each layer is given on prompts and in some steps is taken down.
The graph is run in pieces: each layer on what torch's was given, and all of them in turn. So no more is in
memory than one layer, or one of the other parts.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from janus_export.bundle.contract import MAGNITUDE
from janus_export.gates.quantized import HALF_MAX, compare_drawing
from janus_export.reference.compare import agree, compare_part, magnitude
from janus_export.reference.prompts import DRAWING, images
from janus_export.reference.recording import Array
from janus_export.reference.streamed import LeanReference, Pass
from janus_export.reference.subgraphs import cut
from janus_export.reference.target import Check, Subject
from janus_export.reference.upcast import widened
from janus_export.runtimes.ort.library import onnxruntime
from janus_export.runtimes.ort.runtime import quiet_options
from janus_modular import ImageInput, Message

Feed = dict[str, Array]


def layers(subject: Subject) -> Iterator[Check]:
    """Run every layer of the backbone on what torch's was given, then all of them in turn."""
    reference = cast(LeanReference, subject.reference)
    path, stack = reference.stack
    passes, kind = reference.passes, subject.rounded_to
    capacity = int(passes[-1].at.max()) + 1
    model = ir.load(subject.bundle.path("backbone", subject.variant))
    is_float16 = subject.record["dtype"] == "float16"
    known = [_feed(one, capacity) for one in passes]  # of each pass: what pieces may want
    largest, compared = (0.0, ""), 0
    for piece in cut(model, path, len(stack), stream="x", inside=is_float16):
        with Alone(piece.model) as graph:
            if piece.layer is not None:
                compared += 1
                fed = [
                    {**feed, piece.takes: one.states[piece.layer]}
                    for feed, one in zip(known, passes, strict=True)
                ]
                alone = [outputs[piece.gives] for outputs in _run(subject, graph, fed)]
                yield _compare_layer(piece.layer, kind, alone, passes)
            for feed, outputs in zip(known, _run(subject, graph, known), strict=True):
                largest = max(largest, *((_size(value), name) for name, value in outputs.items()))
                feed.update({name: outputs[name] for name in piece.carries})
    there = subject.bundle.manifest["cache"]["layers"]
    yield Check("layers compared", compared == there, str(compared), str(there))
    if is_float16:
        found = f"{largest[0]:.4g} at {largest[1]}"
        yield Check("largest number inside the backbone", largest[0] < HALF_MAX, found, f"< {HALF_MAX:.0f}")
    got, want = (
        np.concatenate([states[one.counts] for states, one in zip(of, passes, strict=True)])
        for of in ([feed["hidden"] for feed in known], [one.hidden for one in passes])
    )
    if kind == "exact":
        yield agree("all layers in turn", kind, got, want)
    else:
        yield from compare_drawing(subject, "all layers in turn", got, want)


def _feed(one: Pass, capacity: int) -> Feed:
    mask = (np.arange(capacity) <= one.at[:, :, None])[:, None]  # (R, 1, T, S)
    return {"x": one.x, "positions": one.at, "mask": mask, "write_index": one.at[:, 0].copy()}


def _run(subject: Subject, graph: Alone, feeds: Sequence[Feed]) -> list[Feed]:
    """Run a piece over successive passes; its caches go from one to the next."""
    rows, _, _, capacity = feeds[0]["mask"].shape
    record = subject.bundle.graphs["backbone"]
    pasts = {past for _, past in record["aliases"]}
    caches = {
        slot["name"]: np.zeros((rows, slot["shape"][1], capacity, slot["shape"][3]), np.float32)
        for slot in record["inputs"]
        if slot["name"] in pasts
    }
    found = []
    for feed in feeds:
        outputs = graph.run(caches | feed)
        caches |= {past: outputs[present] for present, past in record["aliases"] if present in outputs}
        found.append(outputs)
    return found


def _compare_layer(layer: int, kind: str | int, got: Sequence[Array], passes: Sequence[Pass]) -> Check:
    """Compare a layer's states; of rounded ones what it adds to its input, which is far larger."""
    given, want = (
        np.concatenate([one.states[at][one.counts] for one in passes]) for at in (layer, layer + 1)
    )
    states = np.concatenate([state[one.counts] for state, one in zip(got, passes, strict=True)])
    if kind == "exact":
        return agree(f"layer {layer}", kind, states, want)
    return agree(f"layer {layer}: what it adds", kind, states - given, want - given)


@torch.no_grad()
def parts(subject: Subject) -> Iterator[Check]:
    """Run every graph beside the backbone alone, on states of torch's own."""
    reference = cast(LeanReference, subject.reference)
    model, path, rng = reference.model, reference.model.generation, np.random.default_rng(0)
    hidden = np.concatenate([one.hidden[one.counts] for one in reference.passes])
    hidden = hidden[: len(hidden) // 2 * 2]  # half of them as if unconditional
    torchs = reference.janus.runtime.open(1)
    prompt = reference.processor.chat_prompt([Message("user", [*map(ImageInput, images(2))])])
    noises = (
        rng.standard_exponential((rows, width), np.float32)
        for rows, width in ((len(hidden), model.backbone.vocab_size), (len(hidden) // 2, path.sizes["codes"]))
    )
    one, warm = np.float32(1), np.float32(1.2)  # temperatures
    noise = rng.integers(0, 256, (2, 3, path.height, path.width), np.uint8)
    codes = torchs.to_host(torchs.run("tokenize_image", noise))
    drawn = torchs.to_host(torchs.run("decode_image", codes))
    inputs: dict[str, tuple[Any, ...]] = {
        "understand": (np.stack(prompt.understanding_pixels),),
        "embed": (np.arange(2 * 7).reshape(2, 7) * 37 % model.backbone.vocab_size,),
        "sample_text": (hidden, next(noises), warm, np.int64(40), np.float32(0.9)),
        "sample_image": (hidden, next(noises), np.float32(DRAWING["guidance"]), one),
        "decode_image": (codes,),
        "tokenize_image": (drawn,),
    }
    direct: dict[str, Callable[[Tensor], Tensor]] = {
        "understand": model.understanding,
        "embed": model.backbone.embed,
    }
    for name, given in ((name, given) for name, given in inputs.items() if name in subject.bundle.graphs):
        with Alone(ir.load(subject.bundle.path(name, subject.variant))) as graph:
            feed = dict(zip(graph.inputs, map(np.asarray, given), strict=True))
            got = [value for output, value in graph.run(feed).items() if output != MAGNITUDE]
        want = direct[name](torch.from_numpy(given[0])) if name in direct else torchs.run(name, *given)
        wanted = [torchs.to_host(each) for each in (want if isinstance(want, tuple) else (want,))]
        yield from compare_part(name, subject.kind_of(name), [got], [wanted], subject.embeddings_of(name))


class Alone:
    """A graph on the CPU, in float32, its weights in a file of its own; for the length of a ``with``."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def __enter__(self) -> Alone:
        """Write and open it."""
        self.folder = TemporaryDirectory()
        path = Path(self.folder.name) / "graph.onnx"
        ir.save(widened(self.model), path, external_data="graph.data")
        self.session = onnxruntime.InferenceSession(
            str(path), quiet_options(), providers=["CPUExecutionProvider"]
        )
        self.inputs, self.outputs = (
            [slot.name for slot in slots] for slots in (self.session.get_inputs(), self.session.get_outputs())
        )
        return self

    def run(self, feed: Feed) -> Feed:
        """Run it on what it wants of ``feed``."""
        found = self.session.run(self.outputs, {name: feed[name] for name in self.inputs})
        # As they come, they keep the session's memory, of which they are a part.
        return {name: value.copy() for name, value in zip(self.outputs, found, strict=True)}

    def __exit__(self, *_: object) -> None:
        """Let it go at once: sessions are in cycles, and the next one needs the memory."""
        del self.session
        gc.collect()
        self.folder.cleanup()


def _size(value: Array) -> float:
    return magnitude(value) if value.dtype == np.float32 else 0.0
