"""A timed mode of `bench` (text or images): a sampler that is stopped after a number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_export.bench.bytes_read import cache_read, weights_read
from janus_export.runtimes.contract import BundleRuntime
from janus_modular import ConfigError, Janus, Runtime, Session, SessionWrapper, TensorSpec
from janus_modular import Sequence as Prompt
from janus_modular.samplers import with_settings


@dataclass(frozen=True)
class Speed:
    """The speed of a mode; seconds (``_s``) are medians of the rounds."""

    rows: int  # batch rows; with guidance, an image takes two
    prompt: int  # positions of the longest prompt
    steps: int  # timed steps, after the first
    first_s: float  # from the prompt to the first token, or code
    step_s: float  # one further token or position for every row; a pass may give several
    per_s: float  # tokens, or positions of images, a second, all rows together
    read_bytes: int | None  # that a pass has to read: weights, keys and values
    bandwidth_share: float | None  # of the measured read bandwidth; None on a GPU

    def to_dict(self) -> dict[str, Any]:
        """Return the speed as JSON values."""
        return asdict(self)


class TimedSession(SessionWrapper):
    """A session that remembers its last result, so that timing can wait for it.

    Calls other than prefill, step and run are forwarded, and not timed separately.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.rows = self.prompt = 0
        self.graph = ""
        self.last: Any = None

    def prefill(self, prompts: Sequence[Prompt]) -> Any:
        """Forward the call, and count rows and positions."""
        self.rows, self.prompt = len(prompts), max(map(len, prompts))
        self.last = super().prefill(prompts)
        return self.last

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Forward the call."""
        self.last = super().step(x, active)
        return self.last

    def run(self, name: str, *inputs: Any) -> Any:
        """Forward the call."""
        outputs = super().run(name, *inputs)
        self.graph, self.last = name, outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs

    def wait(self) -> float:
        """Wait until the last work is done, also on a GPU, and return the time."""
        self.session.to_host(self.last)
        return time.perf_counter()


class Mode:
    """A sampler that is started again and again on the same prompts."""

    def __init__(
        self,
        janus: Janus,
        slot: str,
        name: str,
        prompts: Sequence[Prompt],
        steps: int,
        *,
        positions: int,
        **settings: Any,
    ) -> None:
        """Prepare a registered sampler, of which ``steps`` steps are timed after the first.

        ``positions``: of an answer or an image, which a sampler may feed before they are timed.

        Raises:
            ConfigError: the prompt and so many steps do not fit into the context.
        """
        max_steps = janus.runtime.context - max(map(len, prompts)) - 1
        if steps > max_steps:
            raise ConfigError(
                f"tokens: found {steps}; expected {max_steps} at most: the context of {janus.runtime.context}"
                " positions holds the prompt and the first step too."
            )
        self.sampler, self.settings = with_settings(janus.plugins, slot, name, settings)
        self.runtime, self.prompts, self.steps = janus.runtime, prompts, steps
        self.prompt = max(map(len, prompts))
        self.rows = 0
        self.max_seq_len = min(janus.runtime.context, self.prompt + positions)
        self.times: list[tuple[float, float]] = []  # of each round: the first step, and one of the others
        self.passes = 1.0  # for a step, in the last round

    def warm_up(self) -> Callable[[], int | None]:
        """Make the first step, which loads what is still missing; return what counts the next one's bytes."""
        session, steps = self._start()
        next(steps)
        session.wait()

        def count() -> int | None:
            weights = weights_read(self.runtime, session.graph, lambda: next(steps))
            steps.close()
            return weights

        return count

    def measure(self) -> None:
        """Time the first step, and the others."""
        session, steps = self._start()
        start = time.perf_counter()
        before = done = _steps_done(next(steps), 1)
        first = session.wait()
        passes = 0
        while done < before + self.steps:
            done = _steps_done(next(steps), done + 1)
            passes += 1
        end = session.wait()
        steps.close()
        self.times.append((first - start, (end - first) / (done - before)))
        self.passes = passes / (done - before)
        self.rows = session.rows

    def speed(self, weights: int | None, bandwidth: float | None) -> Speed:
        """Return the speed, from the medians of the rounds."""
        first, step = (median(times) for times in zip(*self.times, strict=True))
        cache = cache_read(self.runtime, self.rows * (self.prompt + self.steps / 2))
        read = None if weights is None or cache is None else weights + cache
        return Speed(
            rows=self.rows,
            prompt=self.prompt,
            steps=self.steps,
            first_s=first,
            step_s=step,
            per_s=len(self.prompts) / step,
            read_bytes=read,
            bandwidth_share=None
            if read is None or bandwidth is None
            else read * self.passes / step / bandwidth,
        )

    def _start(self) -> tuple[TimedSession, Generator[Any, Any, Any]]:
        session = TimedSession(self.runtime.open(self.max_seq_len))
        return session, self.sampler(session, self.prompts, self.settings)


def _steps_done(yielded: Any, counted: int) -> int:
    """Return how many steps a sampler has done: the progress of a drawing, or the tokens of an answer."""
    return int(yielded[0]) if isinstance(yielded, tuple) else counted


def time_decoding(runtime: Runtime, images: int) -> float:
    """Time the graphs that make pixels, on zeros, in seconds."""
    session = TimedSession(runtime.open(1))
    inputs = {
        name: [np.zeros(spec.sized({"images": images, "rows": images}), spec.dtype) for spec in specs]
        for name, specs in decoders(runtime).items()
    }
    start = time.perf_counter()
    for name, zeros in inputs.items():
        session.run(name, *zeros)
    return session.wait() - start if inputs else 0.0


def decoders(runtime: Any) -> dict[str, list[TensorSpec]]:
    """Return the inputs of the graphs that decode pixels, by name; "model" and half precision in float32."""
    if not isinstance(runtime, BundleRuntime):
        graphs = {
            graph.name: graph.inputs for graph in runtime.model.generation.graphs() if graph.role == "decode"
        }
    else:
        graphs = {
            name: [
                TensorSpec(tensor["name"], tensor["dtype"], tuple(tensor["shape"]))
                for tensor in record["inputs"]
            ]
            for name, record in runtime.bundle.graphs.items()
            if record.get("role") == "decode"
        }
    floats = ("model", "float16", "bfloat16")
    return {
        name: [replace(spec, dtype="float32" if spec.dtype in floats else spec.dtype) for spec in specs]
        for name, specs in graphs.items()
    }
