"""The configuration of an evaluation. A YAML file in configs/eval is an instance of `EvalConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from janus_modular.interfaces import ComponentSpec, component

QUESTIONS = ("questions", "pope", "mmbench", "captions")
"""Formats with questions, which are answered and scored."""

IMAGES_PER_PROMPT = {"geneval": 4, "dpg-bench": 4, "t2i-compbench": 10, "wise": 1}
"""Formats with prompts to draw, and the images of each prompt that the benchmark expects."""

FIXED = ("dpg-bench", "wise")
"""Formats whose files have no place for another number of images."""

RESERVED = ("numbers", "first", "prefix")
"""Settings of samplers that an evaluation sets itself, or that differ from prompt to prompt."""


QUESTION_FIELDS = ("images", "prompt", "ignore")
USED = {"image-sets": ("images", "encoders"), "clip-score": ("images", "ignore", "clip")}
"""Fields that only some formats use; formats with questions use `QUESTION_FIELDS`."""


@dataclass
class EvalConfig:
    """What is evaluated, and with which settings."""

    # The format of `path`, which decides what is measured.
    evaluate: Literal[
        "questions",
        "pope",
        "mmbench",
        "captions",
        "geneval",
        "dpg-bench",
        "t2i-compbench",
        "wise",
        "reconstruction",
        "image-sets",
        "clip-score",
    ]
    path: str  # the file of questions or prompts; a folder for dpg-bench, reconstruction and image-sets
    images: str | None = None  # folder of the images: those that `path` names, or those that are compared
    encoders: dict[str, ComponentSpec] = component(
        "understanding_encoders"
    )  # whose features image-sets compares, by a name; none: the model's
    clip: str | None = None  # folder or hub id of CLIP's weights, for clip-score
    prompt: str | None = None  # text around {question} and {options}; null: the format's
    ignore: list[str] = field(default_factory=list)  # columns of questions without effect
    n: int | None = None  # images of each prompt; null: the benchmark's number
    settings: dict[str, Any] = field(default_factory=dict)  # the sampler's: max_tokens, guidance, seed, ...
    batch_size: int = 8  # answers or images computed at once

    def __post_init__(self) -> None:
        """Check the values, and that none is without effect."""
        errors = []
        self.encoders = self.encoders or {}
        if not self.path:
            errors.append("path: empty; expected a file or a folder")
        if self.batch_size < 1:
            errors.append(f"batch_size: {self.batch_size}; expected 1 at least")
        used = USED.get(self.evaluate, QUESTION_FIELDS if self.evaluate in QUESTIONS else ())
        for name in (*QUESTION_FIELDS, "encoders", "clip"):
            if getattr(self, name) and name not in used:
                errors.append(f"{name}: has no effect with evaluate: {self.evaluate}; leave it out")
        if self.evaluate == "image-sets" and not self.images:
            errors.append("images: not set; expected the folder that is compared with `path`")
        if self.evaluate == "clip-score" and not self.clip:
            errors.append("clip: not set; expected a folder or a hub id of CLIP's weights")
        if self.prompt is not None and "{question}" not in self.prompt:
            errors.append(
                f"prompt: '{self.prompt:.80}'; expected {{question}} in it, where the question goes"
            )
        if self.n is not None:
            expected = IMAGES_PER_PROMPT.get(self.evaluate)
            if expected is None:
                errors.append(f"n: has no effect with evaluate: {self.evaluate}; leave it out")
            elif self.n < 1 or (self.evaluate in FIXED and self.n != expected):
                at_least = "" if self.evaluate in FIXED else " or another number from 1"
                errors.append(f"n: {self.n}; expected {expected}{at_least}, as {self.evaluate} has it")
        for name in RESERVED:
            if name in self.settings:
                errors.append(f"settings.{name}: is set by the evaluation; leave it out")
        if self.settings and self.evaluate in ("reconstruction", "image-sets", "clip-score"):
            errors.append(f"settings: have no effect with evaluate: {self.evaluate}; leave them out")
        if errors:
            raise ValueError("\n".join(errors))

    @property
    def images_per_prompt(self) -> int:
        """The number of images of each prompt."""
        return self.n or IMAGES_PER_PROMPT[self.evaluate]
