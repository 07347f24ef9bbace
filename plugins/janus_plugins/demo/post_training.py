"""Post-training steps: what other packages do with the model that the demo trained, found by entry points.

    [project.entry-points."janus_plugins.post_training_steps"]
    bundle = "janus_export.demo_step:bundle"

A demo's config names them under ``post_training_steps``. A step is a function with the signature of
`PostTrainingStep`; its package imports nothing of the demo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from janus_modular.errors import ConfigError
from janus_modular.suggest import did_you_mean

GROUP = "janus_plugins.post_training_steps"


class ReportSection(Protocol):
    """What a step adds to the report."""

    @property
    def title(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def columns(self) -> Sequence[str]:
        """Return the head of a table; empty: no table."""
        ...

    @property
    def rows(self) -> Sequence[Sequence[str]]: ...
    @property
    def strips(self) -> Mapping[str, Sequence[Image.Image]]:
        """Return images to lay side by side, by caption."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """Return what is added to report.json."""
        ...


class PostTrainingStep(Protocol):
    """A function that takes a trained model; the first line of its docstring is printed when it starts."""

    def __call__(
        self,
        checkpoint: Path,
        output: Path,
        *,
        prompts: Sequence[str],
        settings: Mapping[str, Any],
    ) -> ReportSection:
        """Process ``checkpoint``; files go into ``output``, the folder of the demo.

        ``prompts`` ask for a drawing of each class; ``settings`` are the demo's own for drawings, with seed.
        """
        ...


def find_steps(names: Iterable[str]) -> dict[str, PostTrainingStep]:
    """Load the steps of these names.

    Raises:
        ConfigError: no installed package provides a step of this name.
        ModuleNotFoundError: a step needs a package that is not installed.
    """
    provided = {point.name: point for point in entry_points(group=GROUP)}
    steps = {}
    for name in names:
        if name not in provided:
            raise ConfigError(
                f"post_training_steps: no step is called '{name}'. {did_you_mean(name, provided)}\n"
                f"Installed packages provide: {', '.join(provided) or 'none'};"
                " post_training_steps=[] runs no step"
            )
        steps[name] = provided[name].load()
    return steps
