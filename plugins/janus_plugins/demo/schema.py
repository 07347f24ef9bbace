"""The configuration of a demo: a model, labelled images, the phases, and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from janus_modular.config.schema import ModelConfig
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig


@dataclass
class PhaseConfig:
    """How a part is trained on its own."""

    batch: int = 64  # images a step
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class DrawingConfig:
    """How images are drawn when they are measured."""

    guidance: float = 2.0  # 1: none
    temperature: float = 1.0


@dataclass
class DemoConfig:
    """What is trained, on what, and what is asked of it afterwards."""

    model: ModelConfig
    images: ComponentSpec = component(
        "sources"
    )  # labelled images with prompts: what the parts are trained on
    held_out: ComponentSpec = component("sources")  # labelled images with questions, never trained on
    sources: dict[str, ComponentSpec] = component("sources")  # what the stages mix, by name
    classifier: PhaseConfig = field(default_factory=PhaseConfig)  # the independent judge of drawings
    tokenizer: PhaseConfig = field(default_factory=PhaseConfig)  # the drawing path's image tokenizer
    encoder: PhaseConfig | None = field(default_factory=PhaseConfig)  # None: the encoder needs no training
    stages: dict[str, Any] = field(
        default_factory=dict
    )  # training configs, in order; each starts from the last
    common: dict[str, Any] = field(default_factory=dict)  # what all stages share
    trackers: list[ComponentSpec] = component("trackers")  # who keeps the figures of every phase
    drawings: dict[str, DrawingConfig] = field(default_factory=dict)  # by the name of its accuracy
    count: int = 200  # drawings for each of these
    post_training_steps: list[str] = field(default_factory=list)  # other packages' steps, by name, in order
    seed: int = 0  # of all chance

    def __post_init__(self) -> None:
        """Refuse a demo that would fail at its end, after minutes of training."""
        if self.count < 1 or self.seed < 0:
            raise ValueError(f"count {self.count}, seed {self.seed}: expected at least 1, and at least 0.")
