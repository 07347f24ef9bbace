"""The loss of a step: the mean over all supervised positions, of all tasks and all processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from janus_modular.model.model import JanusModel, Output
from janus_modular.training.engine import Loss
from janus_modular.training.step_batches import StepBatch


def janus_losses(model: JanusModel, step_batch: StepBatch, device: torch.device | str) -> Iterator[Loss]:
    """Yield the loss of each micro-batch: its share of the mean over all supervised positions of the step.

    Text tokens and image codes have the same weight (the papers weight no task). The named losses of a
    generation path are added at each position. ``packing`` is the share of positions that are no padding.
    """
    counts: dict[str, float] = {
        "samples": sum(step_batch.samples.values()),
        "tokens": sum(step_batch.tokens.values()),
        "supervised": step_batch.supervised,
    }
    counts |= {f"tokens/{name}": count for name, count in step_batch.tokens.items()}
    counts |= step_batch.bad_sample_counts()
    for batch in step_batch.batches:
        output = model(batch.to(device))
        sums = [loss.sum() for loss in output.losses.values()]
        total = torch.stack(sums or [0 * output.hidden.sum()]).sum()  # none: other processes have one here
        means = {f"loss/{name}": (loss.detach().sum(), loss.numel()) for name, loss in output.losses.items()}
        used = 0.0 if batch.lengths is None else float(batch.lengths.sum())
        packing = {"packing": (used, float(batch.tokens.numel()))}
        by_source = _by_source(output, batch.sources)
        yield Loss(total / step_batch.supervised, {**means, **by_source, **packing}, counts)
        counts = {}  # reported once for the step


def _by_source(output: Output, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each source the sum of its losses and the number of its positions."""
    sums, weights = (torch.zeros(len(names), device=output.hidden.device) for _ in range(2))
    for name, loss in output.losses.items():
        sums.index_add_(0, output.sources[name], loss.detach())
        weights.index_add_(0, output.sources[name], torch.ones_like(loss))
    return {f"source/{name}": (sums[i], weights[i]) for i, name in enumerate(names)}
