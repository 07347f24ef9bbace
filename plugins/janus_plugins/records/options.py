"""Options that all sources of records share: where the records are, and the texts around captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from janus_modular import ComponentConfig
from janus_plugins.records.markers import LITERAL, first_marker

QUESTIONS = ("Describe this image.",)


@dataclass
class RecordOptions(ComponentConfig):
    """The path of the data, and the task of its captions."""

    expected: ClassVar[str] = "a path"  # what ``path`` is, for errors

    path: str = ""  # where the data are
    task: Literal["read", "draw"] = "read"  # of captions and classes: describe the image, or draw it
    templates: list[str] = field(
        default_factory=lambda: ["{}"]
    )  # texts for captions and classes; one is chosen at random
    questions: list[str] = field(
        default_factory=lambda: list(QUESTIONS)
    )  # task read; one is chosen at random
    markers: Literal["image", "text"] = (
        "image"  # `<image>` in a text: the position of an image, or plain text
    )

    def __post_init__(self) -> None:
        """Check the options, without the data."""
        if not self.path:
            raise ValueError(f"path: missing; expected {self.expected}.")
        if (
            not self.templates
            or not self.questions
            or not all("{}" in template for template in self.templates)
        ):
            raise ValueError(
                f"templates {self.templates}, questions {self.questions}: expected at least one of each, and"
                " {} in every template, where the caption goes."
            )
        if self.task == "draw" and self.questions != list(QUESTIONS):
            raise ValueError("questions: belong to task: read; with task: draw, leave them out.")
        if self.markers == "image" and (marker := first_marker([*self.templates, *self.questions])):
            raise ValueError(
                f"templates, questions: hold '{marker}'; expected text without a marker, as the image is put"
                f" before the question, or drawn. Remove the marker. {LITERAL}"
            )
