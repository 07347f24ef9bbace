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
    """The losses of a held-out source that later ones are compared with, and the validations since."""

    config: EarlyStopConfig
    best: float | None = None  # the last loss that was lower than those before by more than min_delta
    best_step: int = 0
    waited: int = 0  # validations since then
    lowest: float | None = None  # of all, by however little: of the checkpoint to keep
    lowest_step: int = 0

    @property
    def is_over(self) -> bool:
        """Return True if the run is to end."""
        return self.waited >= self.config.patience

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Compare the losses of a validation after ``step`` steps with the lowest."""
        loss = values[f"validation/{self.config.source}"]
        if self.lowest is None or loss < self.lowest:
            self.lowest, self.lowest_step = loss, step
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
            "lowest": self.lowest,
            "lowest_step": self.lowest_step,
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
                lowest = saved.get("lowest", best)  # older checkpoints lack it
                self.lowest = None if lowest is None else float(lowest)
                self.lowest_step = int(saved.get("lowest_step", self.best_step))
        except (LookupError, TypeError, ValueError) as error:
            raise TrainingError(
                f"the checkpoint's record of early_stop is damaged: {type(error).__name__}: {error}. Resume"
                " from an earlier checkpoint."
            ) from error

    def __str__(self) -> str:
        since = "1 validation" if self.waited == 1 else f"{self.waited:,} validations"
        text = f"stopped early: the loss of {self.config.source} was lowest after step {self.lowest_step:,}"
        if not self.config.min_delta:
            return f"{text} ({self.lowest:.4g}), and the {since} since gave no lower one"
        return (
            f"{text} ({self.lowest:.4g}); {since} since step {self.best_step:,} ({self.best:.4g}) gave none"
            f" that is lower by more than min_delta, {self.config.min_delta:g}"
        )


def is_over(config: EarlyStopConfig | None, training: Mapping[str, Any]) -> bool:
    """Return True if the checkpoint with this training record is the last of a run that stopped early."""
    if config is None:
        return False
    state = EarlyStop(config)
    state.resume(training)
    return state.is_over
