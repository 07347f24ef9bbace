"""Ends a run whose validation loss no longer falls. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from janus_modular.errors import TrainingError
from janus_modular.training.validation_schema import EarlyStopConfig

KEY = "early_stop"
"""Where the training record of a checkpoint has the state."""


@dataclass
class EarlyStop:
    """The lowest loss of a held-out source, and the number of validations since."""

    config: EarlyStopConfig
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # validations without a lower loss

    @property
    def is_over(self) -> bool:
        """Return True if the run is to end."""
        return self.waited >= self.config.patience

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Compare the losses of a validation after ``step`` steps with the lowest."""
        loss = values[f"validation/{self.config.source}"]
        if self.best is None or loss < self.best - self.config.min_delta:
            self.best, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    def to_dict(self) -> dict[str, Any]:
        """Return the state for the record of a checkpoint."""
        return {
            "source": self.config.source,
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "is_over": self.is_over,
        }

    def resume(self, training: Mapping[str, Any]) -> None:
        """Continue from the record of a checkpoint, if that is of the same source.

        Raises:
            TrainingError: the record is damaged.
        """
        saved = training.get(KEY)
        if saved is None:
            return
        try:
            if saved["source"] == self.config.source:
                best = saved["best"]
                self.best = None if best is None else float(best)
                self.best_step, self.waited = int(saved["best_step"]), int(saved["waited"])
        except (LookupError, TypeError, ValueError) as error:
            raise TrainingError(
                f"the checkpoint's record of early_stop is damaged: {type(error).__name__}: {error}. Resume"
                " from an earlier checkpoint."
            ) from error

    def __str__(self) -> str:
        return (
            f"stopped early: the loss of {self.config.source} was lowest after step {self.best_step:,}"
            f" ({self.best:.4g}), and the {self.waited} validations since gave no lower one"
        )


def is_over(config: EarlyStopConfig | None, training: Mapping[str, Any]) -> bool:
    """Return True if the checkpoint with this training record is the last of a run that stopped early."""
    if config is None:
        return False
    state = EarlyStop(config)
    state.resume(training)
    return state.is_over
