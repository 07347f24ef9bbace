"""Checks of objectives, with a small model of random weights and two samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from janus_modular.checkpoints.assembly import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.batch import collate
from janus_modular.model.model import JanusModel
from janus_modular.objectives import Losses, ReadsExamples
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.sequence import ImageInput, ImageTarget, Message, Sample, Text
from janus_modular.testing.check import NotApplicable, check_for, ensure
from janus_modular.testing.comparing import ensure_equal
from janus_modular.training.example_batches import stacked
from janus_modular.training.objective import loss_sums
from janus_modular.training.trainable import set_trainable

TINY = "tiny"


@dataclass
class ObjectiveExample:
    """What an objective is checked with."""

    model: JanusModel
    processor: Processor
    samples: list[Sample]  # an image with a caption each

    def __deepcopy__(self, memo: dict[int, Any]) -> ObjectiveExample:
        """Return a new example with a model of the same weights."""
        example = objective_example()
        example.model.load_state_dict(self.model.state_dict())
        return example


def objective_example(plugins: Plugins | None = None) -> ObjectiveExample:
    """Return the shipped model `tiny` with random weights, an image to draw and an image to read."""
    plugins = plugins or default_plugins()
    config = resolve(load(TINY, plugins=plugins), ModelConfig, plugins)
    assembly = ModelAssembly.from_config(config, plugins)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    drawn = [Message("user", [Text("a red noise")]), Message("assistant", [ImageTarget(images[0])])]
    read = [Message("user", [ImageInput(images[1])]), Message("assistant", [Text("a blue noise", True)])]
    samples = [Sample(messages, source="pairs") for messages in (drawn, read)]
    return ObjectiveExample(assembly.model, assembly.processor, samples)


def on_tiny_model(factory: Callable[..., Any], config: Any) -> tuple[Any, ObjectiveExample]:
    """Return an objective, built as ``factory(config, model)``, and its example."""
    example = objective_example()
    return factory(config, example.model), example


def losses_of(objective: Any, example: ObjectiveExample) -> tuple[Losses, Any]:
    """Return the losses of the example's samples in a first step, and their batch."""
    if isinstance(objective, ReadsExamples):
        rng = np.random.default_rng(0)
        batch: Any = stacked([objective.example(x, example.processor, rng) for x in example.samples])
    else:
        batch = collate([example.processor.sequence(sample) for sample in example.samples])
    return objective.losses(example.model, batch, step=0), batch


@check_for("objectives")
def check_objective_trains(objective: Any, example: ObjectiveExample) -> None:
    """Losses are finite, of the declared shape, and have gradients in every path that it trains."""
    set_trainable(example.model, list(objective.trains), objective.trains)
    objective.train()
    losses, batch = losses_of(objective, example)
    sums = loss_sums(losses, batch)
    ensure(bool(sums), "it has no losses, so that nothing can be trained")
    for name, (total, _) in sums.items():
        ensure(bool(total.isfinite()), f"the loss '{name}' is {total.item()}; expected a finite number")
    torch.stack([total for total, _ in sums.values()]).sum().backward()
    for path in objective.trains:
        parameters = [*example.model.get_submodule(path).parameters()]
        ensure(
            any(p.grad is not None for p in parameters),
            f"no parameter in {path}, which `trains` names, gets a gradient",
        )


@check_for("objectives")
@torch.no_grad()
def check_objective_eval(objective: Any, example: ObjectiveExample) -> None:
    """In eval mode, losses change neither the model nor the objective."""
    example.model.eval()
    objective.eval()
    modules = nn.ModuleDict({"model": example.model, "objective": objective})
    before = {name: value.clone() for name, value in modules.state_dict().items()}
    losses_of(objective, example)
    ensure_equal(modules.state_dict(), before, "model and objective before and after computing losses")


@check_for("objectives")
def check_objective_owns(objective: Any, example: ObjectiveExample) -> None:
    """Its parameters are its own: none is the model's."""
    of_model = {id(parameter) for parameter in example.model.parameters()}
    kept = [name for name, parameter in objective.named_parameters() if id(parameter) in of_model]
    ensure(not kept, f"it keeps {kept[:3]}, which are the model's: `losses` gets the model each time")


@check_for("objectives")
def check_objective_examples(objective: Any, example: ObjectiveExample) -> None:
    """The example of a sample follows from the sample and the random generator alone."""
    if not isinstance(objective, ReadsExamples):
        raise NotApplicable("its batches are of token sequences")
    for sample in example.samples:
        first, second = (
            objective.example(sample, example.processor, np.random.default_rng(1)) for _ in range(2)
        )
        ensure(first.keys() == second.keys(), f"it has {[*first]} once, and {[*second]} then")
        for name, array in first.items():
            problem = f"'{name}' is of type {type(array).__name__}; expected a numpy array: np.asarray(x)"
            ensure(isinstance(array, np.ndarray), problem)
            ensure(np.array_equal(array, second[name]), f"'{name}' differs for the same generator")
