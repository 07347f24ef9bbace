"""The batches of examples that objectives make of samples: images alone, or images and captions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from janus_modular.errors import DataError, JanusError, UnsupervisedError
from janus_modular.foreign import reason
from janus_modular.sequence import Sample
from janus_modular.training.bad_samples import Action, SampleError
from janus_modular.training.mixture import Mixture, SampleRef
from janus_modular.training.step_builder import (
    MAX_ATTEMPTS,
    PreparedSample,
    StepBatch,
    StepBuilder,
    count_samples,
)

Example = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ExampleBuilder(StepBuilder):
    """Builds batches of examples: one of each sample."""

    example: Callable[[Sample, np.random.Generator], Example]
    compares: bool = False  # its losses compare all examples of a batch

    def read(self, ref: SampleRef, sample: Sample) -> tuple[list[Example], Action | None, str]:
        """Return the example of a sample.

        Raises:
            SampleError: the sample cannot be used.
        """
        rng = self.mixture.rng(ref, purpose=MAX_ATTEMPTS + 2)  # no other purpose has this number
        try:
            return [self.example(sample, rng)], None, ""
        except UnsupervisedError as error:
            raise SampleError("unsupervised", str(error)) from error
        except (JanusError, OSError, UnicodeError) as error:
            raise SampleError("unreadable", str(error)) from error
        except Exception as error:  # a third-party objective may raise anything
            raise DataError(f"the objective fails on a sample: {reason(error)}") from error

    def collate(self, prepared: list[PreparedSample]) -> StepBatch:
        """Stack the examples of a step as micro-batches."""
        examples = [example for sample in prepared for example in sample.sequences]
        groups = np.array_split(np.arange(len(examples)), self.accumulate)
        return StepBatch(
            batches=[stacked([examples[i] for i in group]) for group in groups if len(group)],
            supervised=len(examples),
            samples=count_samples(prepared),
            tokens={},
            bad_samples=[bad_sample for sample in prepared for bad_sample in sample.bad_samples],
        )

    def held_out(self, mixture: Mixture, accumulate: int) -> ExampleBuilder:
        """Return the builder of a mixture of validation; compared examples are all in each process."""
        rank, world = (0, 1) if self.compares else (self.rank, self.world)
        return replace(self, mixture=mixture, accumulate=accumulate, rank=rank, world=world)

    def alone(self, example: Example) -> Mapping[str, Tensor]:
        """Return a micro-batch of one example."""
        return stacked([example])


def stacked(examples: list[Example]) -> dict[str, Tensor]:
    """Return the arrays of examples as tensors (n, ...) by name.

    Raises:
        DataError: examples have other names, or arrays of other shapes.
    """
    first = {name: (array.shape, array.dtype) for name, array in examples[0].items()}
    for example in examples:
        if (differing := {name: (array.shape, array.dtype) for name, array in example.items()}) != first:
            raise DataError(
                f"the objective makes examples of {differing} and of {first}; expected the same arrays, of"
                " one shape and dtype, of every sample"
            )
    return {name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in first}
