"""Objectives: what a training run minimises, and what its batches are made of.

The loss of Janus' stages, `multimodal`, is one of them; others train a component by a loss of its own. torch
is imported for types only. Shapes as in ``janus_modular.interfaces``; n examples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from janus_modular.model.model import JanusModel
    from janus_modular.processing.processor import Processor
    from janus_modular.sequence import Sample
    from janus_modular.training.schema import OptimizerConfig


Metrics: TypeAlias = "Mapping[str, tuple[Tensor | float, Tensor | float]]"
"""Means to log, by name: (sum, number of summands)."""


@dataclass
class Losses:
    """The losses of a micro-batch, and what is logged beside them.

    A step minimises the sum of the terms' means over all items of the step, whatever its micro-batches and
    processes: supervised positions of token sequences, or examples.
    """

    terms: Mapping[str, Tensor]  # minimised, by name: of each item (M,), or the mean over the examples ()
    metrics: Metrics = field(default_factory=dict)  # logged beside the terms
    zero: Tensor | None = None  # a zero that depends on all sharded parameters, where there may be no terms


class Objective(Protocol):
    """What a run minimises: an ``nn.Module``, built as ``factory(config, model)``.

    The parameters of the module itself (a discriminator, a text tower) are trained beside the model's, and
    are saved in the checkpoints of training; the trained model does not have them. The module must not keep
    the model, or any part of it: `losses` gets the model each time.

    Without `ReadsExamples`, batches are the model's own, of token sequences
    (`janus_modular.model.batch.Batch`).
    """

    trains: Sequence[
        str
    ]  # paths in the model that gradients reach: `learn` may name these, or what is inside

    def losses(self, model: JanusModel, batch: Any, *, step: int) -> Losses:
        """Return the losses of a micro-batch of step ``step`` (from 0).

        In eval mode (`nn.Module.eval`), as in a validation, nothing may change: no running statistics.
        """
        ...


@runtime_checkable
class ReadsExamples(Objective, Protocol):
    """An objective whose batches are not token sequences: each sample becomes an example, named arrays.

    A batch is a mapping of the same names to tensors (n, ...) on the device of the model.
    """

    def example(
        self, sample: Sample, processor: Processor, rng: np.random.Generator
    ) -> Mapping[str, NDArray[Any]]:
        """Return the arrays of a sample, each of the same shape and dtype in all examples.

        It runs in threads, or in forked processes: no torch. All randomness comes from ``rng``.

        Raises:
            DataError: the sample cannot be used.
            UnsupervisedError: nothing can be learned in it.
        """
        ...


@runtime_checkable
class ComparesExamples(ReadsExamples, Protocol):
    """An objective that compares the examples of a step with each other, over all of its processes.

    Micro-batches would have other losses than the whole step, so that `accumulate` has to be 1. In training,
    the examples of other processes come from `janus_modular.gather_examples`; in a validation, each process
    has them all.
    """

    compares_examples: bool  # False: each example has a loss of its own


@runtime_checkable
class HasOptimizers(Objective, Protocol):
    """An objective whose own submodules have optimizers of their own, such as a discriminator."""

    def optimizers(self) -> Mapping[str, OptimizerConfig]:
        """Return the optimizer of each such submodule, by its path in the objective.

        The schedule of the run scales its learning rate too; its gradients are clipped by themselves.
        """
        ...
