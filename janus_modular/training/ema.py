"""Exponential moving averages of the trained weights (EMA), which are saved with each checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from janus_modular.errors import CheckpointError
from janus_modular.foreign import foreign_errors, reason
from janus_modular.training.parallel import full_tensor, local_tensor, sharded_like
from janus_modular.training.run_folder import STATE

KEY = "ema"
"""Where a training state has the averages, by the names of the parameters."""


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

    def state_dict(self, *, keep: bool) -> dict[str, Tensor | None]:
        """Return the whole averages, a collective operation; without ``keep``, None for sharded ones."""
        return {name: full_tensor(average, keep=keep) for name, average in self.averages.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the averages.

        Raises:
            ValueError: they are of other parameters.
        """
        own = {name: tuple(average.shape) for name, average in self.averages.items()}
        if (stored := {name: tuple(average.shape) for name, average in state.items()}) != own:
            different = sorted({*own.items()} ^ {*stored.items()})
            raise ValueError(f"the averages (ema) are of other parameters: {different[0][0]} differs")
        for name, average in self.averages.items():
            local_tensor(average).copy_(local_tensor(sharded_like(state[name], self.parameters[name])))

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            weight, average = local_tensor(parameter), local_tensor(self.averages[name])
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def read_averages(checkpoint: Path) -> dict[str, Tensor]:
    """Return the averages that a checkpoint of a run has, by the names of the parameters.

    Raises:
        CheckpointError: it has none.
    """
    path = checkpoint / STATE
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no training state ({STATE}); expected a checkpoint of a run with ema:"
            " RUN/checkpoints/step-N. A run's folder model has the weights alone."
        )
    with foreign_errors(path, CheckpointError):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {reason(error)}. Use another checkpoint.") from error
    if not isinstance(state.get(KEY), dict):
        raise CheckpointError(f"{checkpoint} has no averages of its weights: its run had no ema.")
    averages: dict[str, Tensor] = state[KEY]
    return averages
