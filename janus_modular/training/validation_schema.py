"""The configuration of what is measured during a training run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from janus_modular.interfaces import ComponentSpec, component


@dataclass
class EarlyStopConfig:
    """When a run ends before its last step."""

    source: str  # held-out source whose loss counts: a key of validation.sources
    patience: int = 3  # validations in a row without a lower loss, after which the run ends
    min_delta: float = 0.0  # a loss is lower if it is by more than this

    def __post_init__(self) -> None:
        """Raise an error for values that would end a run at once, or never."""
        if self.patience < 1 or not 0 <= self.min_delta < inf:
            raise ValueError(
                f"patience {self.patience}, min_delta {self.min_delta}: expected at least 1 and 0."
            )


@dataclass
class ValidationConfig:
    """What the model is measured on during training."""

    every: int = 0  # steps, and after the last; 0: never
    sources: dict[str, ComponentSpec] = component("sources")  # held out: no source of the mixture
    samples: int = 64  # of each source: always the same; all of a source that has fewer
    prompts: list[str] = field(default_factory=list)  # drawn each time, from the same noise
    guidance: float | None = None  # of these drawings; null: the default of the image sampler
    temperature: float | None = None  # of these drawings; null: the default of the image sampler
    questions: Any = None  # answered each time: [{text: ..., images: [path]}]
    max_tokens: int = 64  # of an answer
    weights: Literal["trained", "ema"] = "trained"  # ema: the averages of TrainConfig.ema
    early_stop: EarlyStopConfig | None = None  # ends the run when a loss no longer falls

    def __post_init__(self) -> None:
        """Raise an error for settings without effect."""
        if self.every < 0 or self.samples < 1 or self.max_tokens < 1:
            raise ValueError(
                f"every {self.every}, samples {self.samples}, max_tokens {self.max_tokens}: expected at least"
                " 0, 1 and 1."
            )
        if self.early_stop and self.early_stop.source not in self.sources:
            raise ValueError(
                f"early_stop.source: found '{self.early_stop.source}'; expected a key of validation.sources:"
                f" {', '.join(self.sources) or 'there is none'}."
            )
        if len(set(self.prompts)) < len(self.prompts):  # a tracker gets images by their prompts
            raise ValueError(f"prompts: found {self.prompts}; expected each prompt once.")
        if not self.prompts and (self.guidance is not None or self.temperature is not None):
            raise ValueError("guidance and temperature are those of drawings: expected prompts beside them.")
        self.questions = [] if self.questions is None else self.questions
        is_list = isinstance(self.questions, list)
        for question in self.questions if is_list else [self.questions]:
            is_valid = isinstance(question, dict) and isinstance(question.get("text"), str)
            is_valid = is_valid and isinstance(question.get("images", []), list)
            if not (is_list and is_valid and set(question) <= {"text", "images"}):
                raise ValueError(
                    f"questions: found {question!r:.80}; expected a list of {{text: ..., images: [path]}}."
                )
        measured = bool(self.sources or self.prompts or self.questions)
        if measured != bool(self.every):
            raise ValueError(
                "expected every, and something to measure: sources, prompts or questions; found"
                f" every {self.every} and {'some' if measured else 'none'} of these."
            )
