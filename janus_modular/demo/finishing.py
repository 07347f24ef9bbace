"""What other packages do with the trained model at the end of the demo: announced in metadata.

    [project.entry-points."janus_modular.demo_steps"]
    bundle = "janus_export.demo_step:bundle"

A demo's config names them under ``finish``. Each is a function that takes a `Trained` and returns a `Shown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from PIL import Image

from janus_modular.errors import ConfigError
from janus_modular.suggest import did_you_mean

GROUP = "janus_modular.demo_steps"


@dataclass(frozen=True)
class Trained:
    """A trained model, and what it is asked for."""

    model: Path  # the checkpoint
    output: Path  # the demo's folder, where a step may write
    prompts: Sequence[str]  # one for each class
    guidance: float
    temperature: float
    seed: int


@dataclass(frozen=True)
class Shown:
    """What a step adds to the report."""

    title: str
    text: str
    columns: Sequence[str] = ()  # of a table
    rows: Sequence[Sequence[str]] = ()
    strips: Mapping[str, Sequence[Image.Image]] = field(default_factory=dict)  # images, by caption
    figures: Mapping[str, float] = field(default_factory=dict)  # for report.json


Step = Callable[[Trained], Shown]


def find_steps(names: Iterable[str]) -> dict[str, Step]:
    """Load the steps of these names.

    Raises:
        ConfigError: no installed package announces one of them.
        ModuleNotFoundError: it needs a package that is not installed.
    """
    announced = {point.name: point for point in entry_points(group=GROUP)}
    steps = {}
    for name in names:
        if name not in announced:
            raise ConfigError(
                f"finish: no step is called '{name}'. {did_you_mean(name, announced)}\n"
                f"Announced: {', '.join(announced) or 'none'}; finish=[] leaves them all out"
            )
        steps[name] = announced[name].load()
    return steps
