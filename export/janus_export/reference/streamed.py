"""The reference of a large model: torch with its weights on disk, recorded layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from janus_export.errors import ExportError
from janus_export.process_memory import fix_mmap_threshold
from janus_export.reference.on_disk import leave_on_disk
from janus_export.reference.prompts import DRAWING, DRAWN, known_settings
from janus_export.reference.recording import Array, RecordingRuntime, Run
from janus_export.reference.target import Reference
from janus_modular.checkpoints import ModelAssembly
from janus_modular.checkpoints.opening import LazyCheckpoint
from janus_modular.janus import Janus
from janus_modular.model.model import position_axes
from janus_modular.positions import RowPositions

STEPS = 2  # after the prompts
POSITIONS = 16  # at most, in these steps: a cache of whole images would take gigabytes


@dataclass
class ForwardPass:
    """A recorded forward pass of torch's backbone: R rows, T positions, hidden size D."""

    x: Array  # (R, T, D)
    index: Array  # (R, T) of the positions in their rows
    positions: Array  # (R, T), or (1 + P, R, T) with ids on P axes
    counts: Array  # (R, T): False for padding of shorter rows
    hidden: Array  # (R, T, D)
    together: Array | None  # (R, T') blocks of a prompt's positions that attend to each other
    unseen: Array | None  # (R, T') positions of the rows that no other attends to
    states: list[Array]  # (R, T, D) each: the inputs of all layers, then the output of the last layer


class StreamedReference(Reference):
    """The model in torch, its weights on disk, and its layers' inputs and outputs for prompts of drawings."""

    is_streamed = True

    @classmethod
    def opened(cls, opened: LazyCheckpoint) -> StreamedReference:
        """Use a lazily opened checkpoint; no weights are loaded."""
        fix_mmap_threshold()
        return cls(Janus.of(ModelAssembly(leave_on_disk(opened), opened.processor)))

    @cached_property
    def stack(self) -> tuple[str, nn.ModuleList]:
        """The backbone's list of layers, and its path."""
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if name.startswith("backbone.") and isinstance(module, nn.ModuleList)
        ]
        if not lists:
            raise ExportError(
                f"{type(self.model.backbone).__name__} has no list of layers (nn.ModuleList), so it cannot be"
                " verified layer by layer. Verify it as a whole, with more memory: --whole"
            )
        return lists[0]

    @property
    def passes(self) -> list[ForwardPass]:
        """The forward passes of `recorded`."""
        return self.recorded[1]

    @cached_property
    def recorded(self) -> tuple[Run, list[ForwardPass]]:
        """Draw until the backbone has made `STEPS` steps after prompts of different lengths."""
        prompts = [self.processor.draw_prompt(text) for text in DRAWN]
        name = self.janus.runtime.image_sampler
        sampler = self.janus.plugins.entry("image_samplers", name)
        settings = sampler.config(**known_settings("image_samplers", name, DRAWING))
        recording = RecordingRuntime(self.janus.runtime)
        session = recording.open(max(map(len, prompts)) + POSITIONS)
        run = recording.runs[-1]
        with recorded_passes(self.model.backbone, self.stack[1]) as passes:
            steps = sampler.factory(session, prompts, settings)
            while len(run.reads) <= STEPS and next(steps, None) is not None:
                pass
            steps.close()
        if [len(forward.x) for forward in passes] != [len(read.after) for read in run.reads]:
            raise ExportError(
                f"the image sampler '{name}' reads prompts into some rows while others stay (session.admit),"
                " and layers are compared on all rows. Verify the model as a whole, with more memory: --whole"
            )
        for read, forward in zip(run.reads, passes, strict=True):
            start = np.zeros_like(read.before) if read.prompts else read.before
            forward.index = start[:, None] + np.arange(forward.x.shape[1])
            if read.prompts:
                rows = RowPositions.of_prompts(position_axes(self.model.backbone), read.prompts)
            forward.positions = rows.of(forward.index)
            forward.together = rows.blocks if read.prompts else None
            forward.unseen = rows.hidden_in()
            forward.counts = forward.index < read.after[:, None]
        return run, passes


@contextmanager
def recorded_passes(backbone: Any, stack: nn.ModuleList) -> Iterator[list[ForwardPass]]:
    """Record the forward passes of a backbone; the caller fills in their positions."""
    recorded: list[ForwardPass] = []
    states: list[Array] = []

    def before_layer(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        values = (*args, *kwargs.values())
        states.append(
            next(v for v in values if isinstance(v, Tensor) and v.is_floating_point()).numpy().copy()
        )

    def after_layer(_: nn.Module, args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).numpy().copy())

    def after_backbone(_: nn.Module, args: Any, hidden: Tensor) -> None:
        nothing = np.zeros(0)
        recorded.append(
            ForwardPass(
                args[0].numpy().copy(),
                *(nothing, nothing, nothing),
                hidden.numpy().copy(),
                *(None, None),
                states.copy(),
            )
        )
        states.clear()

    hooks = [layer.register_forward_pre_hook(before_layer, with_kwargs=True) for layer in stack]
    hooks += [stack[-1].register_forward_hook(after_layer), backbone.register_forward_hook(after_backbone)]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
