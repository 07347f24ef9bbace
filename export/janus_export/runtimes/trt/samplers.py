"""Parts that choose what comes next, bound to addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from janus_export.runtimes.trt.engine import Engine
from janus_export.runtimes.trt.memory import Choices, Column, DeviceTensor, Feed


class Chooser:
    """``sample_text`` or ``sample_image`` for inputs of one shape: states in; ids and embeddings out."""

    def __init__(
        self,
        engine: Engine,
        inputs: Sequence[Any],
        between: Callable[[str, int], DeviceTensor],
        *,
        steps: int,
        ahead: int,
    ) -> None:
        """Bind it to what lies on the GPU; the other inputs are sent every time.

        ``between(name, rows)`` returns what steps hand to each other; ``steps`` is how many choices are
        kept, ``ahead`` how many steps the host may run ahead.

        Raises:
            PromptError: the engine was not built for so many rows or images.
        """
        slots = engine.contract.inputs
        axes = engine.contract.measure([np.shape(given) for given in inputs])
        [profile] = engine.profiles
        engine.require(profile, axes)
        there = {s.name: x for s, x in zip(slots, inputs, strict=True) if isinstance(x, DeviceTensor)}
        self.names = [slot.name for slot in slots]
        self.feed = Feed(engine.gpu, [slot for slot in slots if slot.name not in there], axes, ahead=ahead)
        self.made: dict[str, DeviceTensor] = {}
        self.choices: dict[str, Choices] = {}
        self.columns: dict[str, Column] = {}
        for slot in engine.contract.outputs:
            shape = slot.sized(axes)
            is_x = slot.name == "x"
            self.made[slot.name] = (
                between("x", shape[0]) if is_x else DeviceTensor.zeros(engine.gpu, shape, slot.dtype)
            )
            if slot.dtype == "int64":
                self.choices[slot.name] = Choices(engine.gpu, shape, steps)
        self.binding = engine.bind(profile, axes, {**there, **self.feed.tensors, **self.made})

    def begin(self, inputs: Sequence[Any]) -> tuple[DeviceTensor, ...]:
        """Put those inputs on their way that are not on the GPU; return where the outputs will be."""
        self.feed.send(dict(zip(self.names, inputs, strict=True)))
        self.columns = {name: choices.next() for name, choices in self.choices.items()}
        return tuple(self.columns.get(name, tensor) for name, tensor in self.made.items())

    def keep(self) -> None:
        """Copy what was chosen to its place, behind the work that chooses it."""
        for name, column in self.columns.items():
            column.take(self.made[name])
