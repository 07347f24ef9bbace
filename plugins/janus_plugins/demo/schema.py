"""The configuration of a demo: a model, labelled images, the training phases, and the evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from janus_modular.config.schema import ModelConfig
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.training.schema import OptimizerConfig, ScheduleConfig

METRICS = {
    "reading_accuracy": "held-out images read correctly",
    "drawing_accuracy": "drawings that the classifier recognises as the requested class",
    "drawing_accuracy_t1": "the same at temperature 1",
    "drawing_accuracy_t1_g1": "the same without guidance",
    "drawing_accuracy_g1": "the same without guidance",
    "classifier_accuracy": "the classifier itself, on held-out images",
    "diversity_ratio": "distance between drawings of a class, relative to real images",
    "nearest_ratio": "distance to the nearest training image, relative to real images",
    "codes_used": "share of the codebook in use on held-out images",
    "psnr_db": "reconstruction of held-out images by the image tokenizer or autoencoder",
}
"""Metrics with what they measure, in the order of tables."""


@dataclass
class PhaseConfig:
    """How the classifier is trained."""

    batch: int = 64  # images a step
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class DemoConfig:
    """A demo: components, stages, evaluation and post-training steps."""

    model: ModelConfig
    images: ComponentSpec = component("sources")  # labelled images with prompts, to train the classifier
    held_out: ComponentSpec = component("sources")  # labelled images with questions, for evaluation alone
    trained: ComponentSpec | None = component(
        "sources"
    )  # named images with questions that the stages train on, for evaluation beside `held_out`
    sources: dict[str, ComponentSpec] = component("sources")  # the sources of the stages' mixtures, by name
    classifier: PhaseConfig | None = field(
        default_factory=PhaseConfig
    )  # the independent classifier of drawings; null: the images have no classes, each has a name of its own
    stages: dict[str, Any] = field(
        default_factory=dict
    )  # training configs, in order; each starts from the previous one
    common: dict[str, Any] = field(default_factory=dict)  # settings that all stages share
    processes: int = 1  # of each stage, on this machine
    trackers: list[ComponentSpec] = component("trackers")  # where the metrics of every phase are logged
    drawings: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # settings of the image sampler, by the name of the accuracy metric: {guidance: 2.0}
    count: int = 200  # drawings for each of these
    thresholds: dict[str, float] = field(default_factory=dict)  # the least values that metrics should have
    post_training_steps: list[str] = field(default_factory=list)  # by name, in order; of other packages
    seed: int = 0  # of weights, samples and drawings

    def __post_init__(self) -> None:
        """Raise an error for a demo that would fail at its end, after minutes of training."""
        if (self.classifier is None) != (self.trained is not None):
            raise ValueError(
                "classifier: evaluates drawings of classes, and `trained` those of images with a name each;"
                " expected one of the two, and null for the other."
            )
        if self.processes < 1 or not self.drawings:
            raise ValueError(
                f"processes {self.processes}, {len(self.drawings)} drawings: expected at least 1 of each."
            )
        if self.count < 1 or self.seed < 0:
            raise ValueError(f"count {self.count}, seed {self.seed}: expected at least 1, and at least 0.")
        known = {*METRICS, *self.drawings}
        if unknown := sorted(set(self.thresholds) - known):
            raise ValueError(
                f"thresholds: {', '.join(unknown)}; expected some of {', '.join(sorted(known))}."
            )
