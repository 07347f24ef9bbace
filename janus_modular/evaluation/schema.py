"""The configuration of an evaluation. A YAML file in configs/eval is an instance of `EvalConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

QUESTIONS = ("questions", "pope", "mmbench")
"""Formats with questions, which are answered and scored."""

IMAGES_PER_PROMPT = {"geneval": 4, "dpg-bench": 4, "t2i-compbench": 10, "wise": 1}
"""Formats with prompts to draw, and the images of each prompt that the benchmark expects."""

FIXED = ("dpg-bench", "wise")
"""Formats whose files have no place for another number of images."""

RESERVED = ("numbers", "first", "prefix")
"""Settings of samplers that an evaluation sets itself, or that differ from prompt to prompt."""


@dataclass
class EvalConfig:
    """What is evaluated, and with which settings."""

    # The format of `path`, which decides what is measured.
    evaluate: Literal[
        "questions", "pope", "mmbench", "geneval", "dpg-bench", "t2i-compbench", "wise", "reconstruction"
    ]
    path: str  # the file of questions or prompts; a folder for dpg-bench and reconstruction
    images: str | None = None  # folder of the images that questions name; null: the folder of `path`
    prompt: str | None = None  # text around {question} and {options}; null: the format's
    ignore: list[str] = field(default_factory=list)  # columns of questions without effect
    n: int | None = None  # images of each prompt; null: the benchmark's number
    settings: dict[str, Any] = field(default_factory=dict)  # the sampler's: max_tokens, guidance, seed, ...
    batch_size: int = 8  # answers or images computed at once

    def __post_init__(self) -> None:
        """Check the values, and that none is without effect."""
        errors = []
        if not self.path:
            errors.append("path: empty; expected a file or a folder")
        if self.batch_size < 1:
            errors.append(f"batch_size: {self.batch_size}; expected 1 at least")
        if self.evaluate not in QUESTIONS:
            for name in ("images", "prompt", "ignore"):
                if getattr(self, name):
                    errors.append(f"{name}: has no effect with evaluate: {self.evaluate}; leave it out")
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
        if self.settings and self.evaluate == "reconstruction":
            errors.append("settings: have no effect with evaluate: reconstruction; leave them out")
        if errors:
            raise ValueError("\n".join(errors))

    @property
    def images_per_prompt(self) -> int:
        """The number of images of each prompt."""
        return self.n or IMAGES_PER_PROMPT[self.evaluate]
