"""The loss of a step: an objective's losses of its micro-batches, and the objective of Janus' stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from janus_modular.capabilities import DerivesWeights
from janus_modular.errors import ConfigError, TrainingError
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.batch import Batch
from janus_modular.model.build import ModelBuilder
from janus_modular.model.model import JanusModel, Output
from janus_modular.objectives import (
    ComparesExamples,
    HasOptimizers,
    Losses,
    Metrics,
    Objective,
    ReadsExamples,
)
from janus_modular.plugins import Plugins
from janus_modular.training.engine import Loss
from janus_modular.training.schema import OptimizerConfig, TrainConfig
from janus_modular.training.step_builder import StepBatch
from janus_modular.weights.loading import parameters_on_meta

OBJECTIVE = "objective"
"""How names of an objective's own parameters begin, beside those of the model."""

OF_SEQUENCES = ("length", "supervise", "condition_dropout", "learn_image_ends")
"""Settings of a run that have an effect on token sequences only."""


@dataclass
class MultimodalConfig:
    """The objective of Janus' stages has no options of its own: the papers weight no task."""


class Multimodal(nn.Module):
    """Every supervised position counts alike, whether of text or of an image.

    The named losses of a generation path are added at each position. ``packing`` is the share of positions
    that are no padding, and ``source/NAME`` the mean loss of a source's positions.
    """

    trains: Sequence[str] = ("understanding", "generation", "backbone")

    def __init__(self, config: MultimodalConfig | None = None, model: JanusModel | None = None) -> None:
        super().__init__()

    def losses(self, model: JanusModel, batch: Batch, *, step: int) -> Losses:
        """Return the cross entropies at supervised positions, and the generation path's losses."""
        output = model(batch)
        used = 0.0 if batch.lengths is None else float(batch.lengths.sum())
        metrics: Metrics = {**_by_source(output, batch.sources), "packing": (used, batch.tokens.numel())}
        return Losses(output.losses, metrics, zero=None if output.losses else 0 * output.hidden.sum())


def _by_source(output: Output, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for each source the sum of its losses and the number of its positions."""
    sums, weights = (torch.zeros(len(names), device=output.hidden.device) for _ in range(2))
    for name, loss in output.losses.items():
        sums.index_add_(0, output.sources[name], loss.detach())
        weights.index_add_(0, output.sources[name], torch.ones_like(loss))
    return {f"source/{name}": (sums[i], weights[i]) for i, name in enumerate(names)}


def build_objective(
    spec: ComponentSpec | None, model: JanusModel, plugins: Plugins, device: torch.device | str
) -> Objective:
    """Build the objective of a run, in training mode; None stands for `Multimodal`.

    On the device ``meta`` no weights are read.

    Raises:
        ConfigError: it rejects its options or the model, or keeps a part of the model.
    """
    if spec is None:
        return Multimodal()
    if on_meta := torch.device(device).type == "meta":
        with parameters_on_meta():
            objective = ModelBuilder(plugins, on_meta=on_meta)(spec, model)
    else:
        with torch.device(device):
            objective = ModelBuilder(plugins)(spec, model).to(device)
    parts = {id(parameter) for parameter in (*model.parameters(), *model.buffers())}
    kept = [name for name, p in (*objective.named_parameters(), *objective.named_buffers()) if id(p) in parts]
    if kept:
        raise ConfigError(
            f"objective: '{spec.name}' keeps {kept[0]}, which is the model's own; expected parameters of its"
            " own alone: `losses` gets the model each time."
        )
    return cast(Objective, objective.train())


def reads_examples(objective: Objective) -> bool:
    """Return True if batches are of examples, False if they are token sequences."""
    return isinstance(objective, ReadsExamples)


def compares_examples(objective: Objective) -> bool:
    """Return True if the losses of an example depend on the other examples of its step."""
    return isinstance(objective, ComparesExamples) and objective.compares_examples


def own_optimizers(objective: Objective) -> dict[str, OptimizerConfig]:
    """Return the optimizers of an objective's submodules, by their paths in `trained_modules`."""
    own = objective.optimizers() if isinstance(objective, HasOptimizers) else {}
    return {f"{OBJECTIVE}.{path}": config for path, config in own.items()}


def trained_modules(model: JanusModel, objective: Objective) -> nn.Module:
    """Return a module with the parameters of both: the model's by their names, the others in `OBJECTIVE`."""
    joined = nn.Module()
    for name, child in model.named_children():
        joined.add_module(name, child)
    joined.add_module(OBJECTIVE, cast(nn.Module, objective))
    joined.training = False
    return joined


class DerivedWeights:
    """Weights of the generation path that follow a frozen submodule which an objective trains.

    A table of codes is a copy of the codebook until a stage trains it. Where they were equal when the run
    began, they are equal in its checkpoints; a table that was trained stays as it is.
    """

    def __init__(self, model: JanusModel, trains: Sequence[str]) -> None:
        """Compare the weights with what they derive from, if the objective trains a part of the path."""
        self.path = model.generation
        self.names: list[str] = []
        if any(name.startswith("generation.") for name in trains) and isinstance(self.path, DerivesWeights):
            own = cast(nn.Module, self.path).state_dict()
            values = self.path.derived_weights()
            self.names = [
                name for name, value in values.items() if torch.equal(own[name], value.to(own[name]))
            ]

    @torch.no_grad()
    def update(self) -> None:
        """Copy the values that they derive from now."""
        if self.names and isinstance(self.path, DerivesWeights):
            own = cast(nn.Module, self.path).state_dict()
            for name, value in self.path.derived_weights().items():
                if name in self.names:
                    own[name].copy_(value)


def step_losses(
    model: JanusModel,
    step_batch: StepBatch,
    device: torch.device | str,
    objective: Objective | None = None,
    step: int = 0,
) -> Iterator[Loss]:
    """Yield the loss of each micro-batch: its share of the mean over all items of the step.

    Items are supervised positions, or examples; all of them count alike, in whatever process.

    Raises:
        TrainingError: a loss has another shape than `Losses` says.
    """
    minimised: Objective = objective or Multimodal()
    counts: dict[str, float] = {"samples": sum(step_batch.samples.values())}
    if step_batch.tokens:
        counts |= {"tokens": sum(step_batch.tokens.values()), "supervised": step_batch.supervised}
    counts |= {f"tokens/{name}": count for name, count in step_batch.tokens.items()}
    counts |= step_batch.bad_sample_counts()
    for batch in step_batch.batches:
        on_device = to_device(batch, device)
        losses = minimised.losses(model, on_device, step=step)
        means = loss_sums(losses, on_device)
        sums = [total for total, _ in means.values()]
        if not sums and losses.zero is None:
            raise TrainingError("the objective returned no loss of a batch; expected at least one.")
        total = torch.stack(sums or [cast(Tensor, losses.zero)]).sum()  # none: other processes have one here
        logged = {f"loss/{name}": (value.detach(), count) for name, (value, count) in means.items()}
        yield Loss(total / step_batch.supervised, {**logged, **losses.metrics}, counts)
        counts = {}  # reported once for the step


def loss_sums(losses: Losses, batch: Any) -> dict[str, tuple[Tensor, int]]:
    """Return for each loss the sum over the batch's items, and their number.

    Raises:
        TrainingError: a loss is neither of each item, nor a mean over examples.
    """
    examples = len(next(iter(batch.values()))) if isinstance(batch, Mapping) else None
    sums: dict[str, tuple[Tensor, int]] = {}
    for name, loss in losses.terms.items():
        if loss.ndim == 0 and examples is not None:
            sums[name] = (loss * examples, examples)
        elif loss.ndim == 1 and examples in (None, len(loss)):
            sums[name] = (loss.sum(), loss.numel())
        else:
            expected = "positions (M,)" if examples is None else f"{examples} examples ({examples},) or ()"
            raise TrainingError(f"the loss '{name}' is {tuple(loss.shape)}; expected that of {expected}.")
    return sums


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Return a micro-batch on a device."""
    if isinstance(batch, Mapping):
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch.to(device)


def check_settings(config: TrainConfig, objective: Objective) -> None:
    """Check that no setting is of token sequences where an objective reads examples.

    Raises:
        ConfigError: lists the settings that would have no effect, or would change the loss.
    """
    if not reads_examples(objective) or config.objective is None:
        return
    name = config.objective.name
    defaults = {field.name: field.default for field in fields(config)}
    settings = {key: getattr(config, key) for key in OF_SEQUENCES}
    errors = [
        f"{key}: {value}; '{name}' trains on examples, not on token sequences: leave it out."
        for key, value in settings.items()
        if value not in (defaults[key], None)
    ]
    if config.codes.path is not None:
        errors.append(f"codes.path: '{name}' reads images, not their codes: leave it out.")
    if config.mixture_unit == "tokens":
        errors.append(f"mixture_unit: '{name}' has no tokens; expected samples.")
    if compares_examples(objective) and config.accumulate > 1:
        errors.append(
            f"accumulate: {config.accumulate}; '{name}' compares all examples of a step with each other, and"
            " micro-batches would have other losses: expected 1."
        )
    if errors:
        raise ConfigError("\n".join(errors))


def refuse_examples(config: TrainConfig, model: JanusModel, plugins: Plugins, hint: str) -> None:
    """Raise ConfigError if the objective of a config reads examples, where token sequences are needed."""
    if config.objective is not None and reads_examples(
        build_objective(config.objective, model, plugins, "meta")
    ):
        raise ConfigError(
            f"objective: '{config.objective.name}' trains on examples; expected one of token sequences, as"
            f" the default: {hint}."
        )
