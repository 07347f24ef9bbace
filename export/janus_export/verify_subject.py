"""What is verified, and what it is held against: runs of the model in torch, taken down step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_export.bundle import Bundle
from janus_export.errors import BundleError
from janus_export.runtimes.onnx_runtime import OnnxConfig, OnnxRuntime
from janus_export.widening import widen
from janus_modular import Message, PictureToRead, Processor, Text
from janus_modular import Sequence as Prompt
from janus_modular.bundles import open_bundle
from janus_modular.janus import Janus
from janus_modular.plugins import default_plugins
from janus_modular.roles import Runtime, Session

Array = NDArray[Any]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    what: str
    passed: bool
    found: str
    wanted: str


@dataclass
class Run:
    """What a session was asked and what it said."""

    prompts: list[Prompt] = field(default_factory=list)
    fed: list[tuple[Array, Array | None]] = field(default_factory=list)  # x (R, D), and who was active
    hidden: list[Array] = field(default_factory=list)  # (R, D), after the prompts and after each step
    parts: list[tuple[str, tuple[Any, ...], tuple[Array, ...]]] = field(default_factory=list)
    chosen: list[Array] = field(default_factory=list)  # ids or codes (rows,), codes (rows, S)

    def active(self, step: int) -> Array:
        """Say which rows count after step ``step``; 0 are the prompts."""
        rows = np.ones(len(self.prompts), np.bool_)
        given = self.fed[step - 1][1] if step else None
        return rows if given is None else given


class Listening:
    """A session that takes down what goes through it."""

    def __init__(self, session: Session, run: Run) -> None:
        self.session, self.run_, self.sizes = session, run, session.sizes

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """Pass on."""
        self.run_.prompts = list(prompts)
        return self._heard(self.session.prefill(prompts))

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Pass on."""
        self.run_.fed.append((self.session.to_host(x).copy(), None if active is None else active.copy()))
        return self._heard(self.session.step(x, active))

    def run(self, part: str, *inputs: Any) -> Any:
        """Pass on."""
        given = tuple(
            np.asarray(x) if isinstance(x, int | float | np.generic | np.ndarray) else self.session.to_host(x)
            for x in inputs
        )
        made = self.session.run(part, *inputs)
        outputs = made if isinstance(made, tuple) else (made,)
        self.run_.parts.append((part, tuple(map(np.copy, given)), tuple(map(self._copied, outputs))))
        if part.endswith("_next"):
            self.run_.chosen.append(self._copied(outputs[0]))
        return made

    def stack(self, columns: Sequence[Any]) -> Any:
        """Pass on."""
        return self.session.stack(columns)

    def to_host(self, x: Any) -> Array:
        """Pass on."""
        return self.session.to_host(x)

    def _heard(self, hidden: Any) -> Any:
        self.run_.hidden.append(self._copied(hidden))
        return hidden

    def _copied(self, x: Any) -> Array:
        return self.session.to_host(x).copy()


class ListeningRuntime:
    """A runtime whose sessions are listened to."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.runs = runtime, list[Run]()
        self.context, self.text_loop = runtime.context, runtime.text_loop
        self.drawing_loop = runtime.drawing_loop

    def open(self, capacity: int) -> Listening:
        """Open a session, and take down what it does."""
        self.runs.append(Run())
        return Listening(self.runtime.open(capacity), self.runs[-1])


def pictures(count: int) -> list[Image.Image]:
    """Make pictures of noise, each of a size of its own."""
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30 + 7 * i, 3), dtype=np.uint8))
        for i in range(count)
    ]


def questions() -> list[list[Message]]:
    """Ask three things of different lengths: one picture, none, two."""
    first, second = pictures(2)
    return [
        [Message("user", [PictureToRead(first), Text("What is this?")])],
        [Message("user", [Text("Say something longer than the others, about nothing in particular.")])],
        [Message("user", [PictureToRead(first), Text("or"), PictureToRead(second)])],
    ]


DRAWN = ("a cat", "a much longer description of two dogs")
DRAWING: dict[str, Any] = {"guidance": 5.0, "temperature": 1.0, "seed": 11}
ANSWER_TOKENS = 24


def taken(loop: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return those settings that a sampling loop has; somebody else's may have none of Janus' own."""
    known = {field.name for field in fields(default_plugins().entry("sampling_loops", loop).config)}
    return {name: value for name, value in settings.items() if name in known}


def listen_to_answers(
    runtime: Runtime, processor: Processor, asked: list[list[Message]], **settings: Any
) -> tuple[list[str], Run]:
    """Let a runtime answer questions side by side; return the answers and what was heard."""
    listening = ListeningRuntime(runtime)
    answers = Janus(listening, processor).chat_batch(
        [(question, ()) for question in asked],
        max_tokens=ANSWER_TOKENS,
        **taken(runtime.text_loop, settings),
    )
    return answers, listening.runs[-1]


def listen_to_drawings(runtime: Runtime, processor: Processor) -> tuple[list[Image.Image], Run]:
    """Let a runtime draw under guidance, with noise from a seed; return pictures and what was heard."""
    listening = ListeningRuntime(runtime)
    drawn = Janus(listening, processor).draw(DRAWN, **taken(runtime.drawing_loop, DRAWING))
    return drawn, listening.runs[-1]


class Reference:
    """The model in torch and float32, and what it does; each run is made once for all variants."""

    is_lean = False  # its weights are in memory, so that it can be run as a whole

    def __init__(self, janus: Janus, asked: list[list[Message]] | None = None) -> None:
        self.janus, self.model, self.processor = janus, janus.model, janus.processor
        self.asked = questions() if asked is None else asked
        self.fewer: dict[int, Reference] = {}

    @classmethod
    def of(cls, path: str | Path) -> Reference:
        """Load it from a checkpoint."""
        return cls(Janus.from_pretrained(path, device="cpu", dtype="float32"))

    def within(self, room: int) -> Reference:
        """Return it with those questions alone whose answers end within ``room`` positions.

        Engines have the capacity that they were built with, which may be less than two pictures take.
        """
        lengths = [len(self.processor.chat_prompt(question)) + ANSWER_TOKENS for question in self.asked]
        asked = [q for q, length in zip(self.asked, lengths, strict=True) if length <= room]
        if len(asked) == len(self.asked):
            return self
        if not asked:
            raise BundleError(f"a room of {room} positions is too small for the shortest question")
        return self.fewer.setdefault(len(asked), Reference(self.janus, asked))

    @cached_property
    def greedy(self) -> tuple[list[str], Run]:
        """Greedy answers."""
        return listen_to_answers(self.janus.runtime, self.processor, self.asked)

    @cached_property
    def sampled(self) -> tuple[list[str], Run]:
        """Answers by chance, cut to the likeliest."""
        settings = {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "seed": 3}
        return listen_to_answers(self.janus.runtime, self.processor, self.asked, **settings)

    @cached_property
    def drawn(self) -> tuple[list[Image.Image], Run]:
        """Drawings; None where the model draws nothing."""
        return listen_to_drawings(self.janus.runtime, self.processor)


@dataclass
class Subject:
    """One variant of a bundle, ready to run."""

    bundle: Bundle
    variant: str
    reference: Reference
    runtime: OnnxRuntime  # of the graphs; of a half-precision variant on a CPU: in float32, weights rounded
    whole: Runtime  # what users run: prompts and steps, whole answers and drawings
    how: str

    @classmethod
    @contextmanager
    def of(
        cls, bundle: Bundle, variant: str, reference: Reference, *, runtime: str, device: str
    ) -> Iterator[Subject]:
        """Open a variant; ONNX Runtime cannot run half precision on a CPU, so its graphs are widened."""
        with TemporaryDirectory() as aside:
            on = device if runtime == "onnx" and not reference.is_lean else "cpu"
            opened = OnnxRuntime(OnnxConfig(variant, on), bundle)
            how = f"ONNX Runtime on {opened.device.name}"
            if opened.device.memory == "cpu" and bundle.manifest["variants"][variant]["dtype"] != "float32":
                if not reference.is_lean:
                    opened = OnnxRuntime(OnnxConfig(variant, "cpu"), widen(bundle, variant, Path(aside)))
                how += ", in float32 with the variant's rounded weights"
            whole: Runtime = opened
            if runtime != "onnx":
                whole, *_ = open_bundle(bundle.folder, runtime=runtime, variant=variant, device=device)
                how = f"{runtime} on {getattr(whole, 'evidence', {}).get('gpu', device)}"
            yield cls(bundle, variant, reference.within(whole.context), opened, whole, how)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of the variant."""
        return self.bundle.manifest["variants"][self.variant]

    @property
    def parts(self) -> Any:
        """What single parts are run by: what users run, where it takes a part by name."""
        return self.whole if hasattr(self.whole, "run") else self.runtime

    @property
    def is_half(self) -> bool:
        """Whether its numbers have 16 bits."""
        return self.record["dtype"] != "float32"

    @property
    def is_exact(self) -> bool:
        """Whether numbers must be the model's own, but for the order of float32 sums."""
        return not self.is_half and not self.record["quantisation"]

    @property
    def rounded_to(self) -> str | int:
        """What its backbone's weights are rounded to: 4 or 8 bits, "half", or nothing ("exact")."""
        rounding = self.record["quantisation"]
        return rounding["bits"] if rounding else "half" if self.is_half else "exact"

    def kind_of(self, graph: str) -> str | int:
        """What one graph's weights are rounded to: as `rounded_to`, for those that are not the backbone."""
        rounding = self.record["quantisation"]
        if rounding and graph in rounding["graphs"]:
            return rounding["bits"]
        return "half" if self.is_half else "exact"
