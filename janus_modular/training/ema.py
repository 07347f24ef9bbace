"""Exponential moving averages of the trained weights (EMA), which are saved with each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from janus_modular.errors import CheckpointError
from janus_modular.training.parallel import local_tensor
from janus_modular.training.run_folder import STATE
from janus_modular.weights.chunks import chunk_files, open_chunks
from janus_modular.weights.files import Weights, open_weights

EMA = "training/ema/"
"""How the names of the averages begin in a training state, before those of the parameters."""


class WeightAverages:
    """The averages of parameters, each sharded as its parameter is.

    average = decay * average + (1 - decay) * weight after each update, from the weights of the start.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = dict(parameters)
        self.averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights."""
        averages, weights = (
            [local_tensor(x) for x in xs.values()] for xs in (self.averages, self.parameters)
        )
        self._average(averages, weights, 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the weights and the averages, and exchange them again at the end: nothing is lost."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages, which are sharded as the parameters are.

        Raises:
            ValueError: they are of other parameters, or of another dtype.
        """
        own, stored = (
            {(name, tuple(average.shape), str(average.dtype)) for name, average in averages.items()}
            for averages in (self.averages, state)
        )
        if different := sorted(own ^ stored):
            raise ValueError(f"the averages (ema) are of other parameters: {different[0][0]} differs")
        for name, average in self.averages.items():
            local_tensor(average).copy_(local_tensor(state[name]))

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            weight, average = local_tensor(parameter), local_tensor(self.averages[name])
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def read_averages(checkpoint: Path) -> Weights:
    """Open the averages that a checkpoint of a run has, by the names of the parameters; sharded ones whole.

    Raises:
        CheckpointError: it has none, or a file is missing or damaged.
    """
    if not (checkpoint / STATE).is_file():
        raise CheckpointError(
            f"{checkpoint} has no training state ({STATE}); expected a checkpoint of a run with ema:"
            " RUN/checkpoints/step-N. A run's folder model has the weights alone."
        )
    chunks = chunk_files(checkpoint, "training")
    state = (
        Weights(checkpoint, open_chunks(chunks))
        if chunks
        else open_weights(checkpoint / "training.safetensors")
    )
    reads = {
        name.removeprefix(EMA): partial(state.__getitem__, name) for name in state if name.startswith(EMA)
    }
    if not reads:
        raise CheckpointError(f"{checkpoint} has no averages of its weights: its run had no ema.")
    return Weights(checkpoint, reads)
