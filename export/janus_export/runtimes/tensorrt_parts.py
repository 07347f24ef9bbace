"""Parts that choose what comes next, bound to addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from janus_export.runtimes.device_memory import Choices, DeviceTensor, Feed
from janus_export.runtimes.tensorrt_contexts import Engine


class Chooser:
    """``text_next`` or ``image_next`` for inputs of one shape: hidden states in, ids and what to feed out."""

    def __init__(
        self,
        engine: Engine,
        inputs: Sequence[Any],
        between: Callable[[str, int], DeviceTensor],
        *,
        steps: int,
        ahead: int,
    ) -> None:
        """Bind it to what lies on the GPU; the other inputs are to be sent every time.

        ``between(name, rows)`` returns what steps hand to each other; ``steps`` is how many choices are
        kept, ``ahead`` how many steps the host may run ahead.

        Raises:
            PromptError: the engine was not built for so many rows or pictures.
        """
        slots = engine.contract.inputs
        axes = engine.contract.measure([np.shape(given) for given in inputs])
        [profile] = engine.profiles
        engine.require(profile, axes)
        there = {s.name: x for s, x in zip(slots, inputs, strict=True) if isinstance(x, DeviceTensor)}
        self.told = [slot.name for slot in slots if slot.name not in there]
        self.names = [slot.name for slot in slots]
        self.feed = Feed(engine.gpu, [slot for slot in slots if slot.name in self.told], axes, ahead=ahead)
        chosen, following = engine.contract.outputs
        self.ids = DeviceTensor.zeros(engine.gpu, chosen.sized(axes), chosen.dtype)
        self.x = between("x", following.sized(axes)[0])
        self.choices = Choices(engine.gpu, self.ids.shape[0], steps)
        made = {chosen.name: self.ids, following.name: self.x}
        self.binding = engine.bind(profile, axes, {**there, **self.feed.tensors, **made})

    def send(self, inputs: Sequence[Any]) -> None:
        """Put those inputs on their way that are not on the GPU."""
        self.feed.send(dict(zip(self.names, inputs, strict=True)))
