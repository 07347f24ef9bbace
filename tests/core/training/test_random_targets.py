"""Targets with randomness (the noise of rectified flow, for example) are a sample's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from janus_modular.model.model import JanusModel
from janus_modular.plugins import default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.training.objective import step_losses
from janus_modular.training.run_setup import batch_builder, open_sources
from janus_modular.training.schema import TrainConfig


def test_accumulation_changes_no_random_target(
    make: Callable[..., TrainConfig],
    built: tuple[JanusModel, Processor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Loss and gradients of a step are those of its micro-batches, and the next step has other targets."""
    model, processor = built
    path = model.generation
    drawn: list[Tensor] = []

    def random_codes(pixels: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        codes = [rng.integers(path.codebooks[0], size=path.num_tokens) for rng in rngs]
        assert len(codes) == len(pixels)
        drawn.append(torch.from_numpy(np.stack(codes)))
        return drawn[-1]

    monkeypatch.setattr(path, "targets", random_codes)

    def step(number: int, **changes: int) -> tuple[float, Tensor, Tensor]:
        config = make(**changes)
        builder = batch_builder(config, open_sources(config, default_plugins()), model, processor)
        drawn.clear()
        model.zero_grad()
        total = 0.0
        for loss in step_losses(model, builder.build(number), "cpu"):
            loss.value.backward()
            total += float(loss.value.detach())
        gradient = torch.cat([p.grad.flatten() for p in path.head.parameters() if p.grad is not None])
        return total, gradient, torch.cat(drawn)

    whole, halves, later = step(3), step(3, accumulate=2), step(4)
    assert torch.equal(whole[2], halves[2])
    assert halves[0] == pytest.approx(whole[0], rel=1e-5)  # float32 sums in another order
    torch.testing.assert_close(halves[1], whole[1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(whole[2][:1], later[2][:1])
