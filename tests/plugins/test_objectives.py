"""The built-in objectives keep the contract of their slot, and objectives that break it are found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from janus_modular import Losses, Multimodal, MultimodalConfig, image_of, target_pixels
from janus_modular.plugins import default_plugins
from janus_modular.testing import checks_of, on_tiny_model, parametrize_with_checks, run_check
from janus_modular.testing.fixtures import context


def built_in(name: str) -> Callable[[], tuple[Any, Any]]:
    return lambda: context(default_plugins(), "objectives", name)()


@parametrize_with_checks(
    "objectives",
    {
        "multimodal": lambda: on_tiny_model(Multimodal, MultimodalConfig()),
        "image-reconstruction": built_in("image-reconstruction"),
        "sigmoid-contrastive": built_in("sigmoid-contrastive"),
    },
)
def test_built_in(component: Any, check: Any) -> None:
    check(component)


class Broken(nn.Module):
    """Reconstructs by the tokenizer's own losses; subclasses break a promise each."""

    trains: tuple[str, ...] = ("generation.tokenizer",)

    def __init__(self, config: None, model: Any) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def example(self, sample: Any, processor: Any, rng: Any) -> Mapping[str, Any]:
        return {"pixels": target_pixels(image_of(sample, rng), processor)}

    def losses(self, model: Any, batch: Mapping[str, Tensor], *, step: int) -> Losses:
        return Losses(model.generation.tokenizer.losses(batch["pixels"].float() / 127.5 - 1))


class TrainsLess(Broken):
    trains = ("generation.tokenizer", "backbone")


class Counts(Broken):
    def losses(self, model: Any, batch: Mapping[str, Tensor], *, step: int) -> Losses:
        self.calls += 1
        return super().losses(model, batch, step=step)


class Keeps(Broken):
    def __init__(self, config: None, model: Any) -> None:
        super().__init__(config, model)
        self.head = model.generation.head


class Random(Broken):
    def example(self, sample: Any, processor: Any, rng: Any) -> Mapping[str, Any]:
        return {"noise": torch.rand(3).numpy(), **super().example(sample, processor, rng)}


@pytest.mark.parametrize(
    ("objective", "check", "message"),
    [
        (TrainsLess, "objective_trains", "no parameter in backbone"),
        (Counts, "objective_eval", "before and after computing losses"),
        (Keeps, "objective_owns", "keeps ['head."),
        (Random, "objective_examples", "'noise' differs"),
    ],
)
def test_a_broken_promise_is_found(objective: Any, check: str, message: str) -> None:
    checks = {each.name: each for each in checks_of("objectives")}
    assert (
        run_check(checks[check], lambda: on_tiny_model(Broken, None), slot="objectives").outcome == "passed"
    )
    result = run_check(checks[check], lambda: on_tiny_model(objective, None), slot="objectives")
    assert result.outcome == "failed"
    assert message in result.note
