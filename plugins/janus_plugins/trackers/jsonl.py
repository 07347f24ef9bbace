"""Figures as JSON, a line for each time they are logged: what every other program can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from janus_modular import ComponentConfig, Registry, Tracker, hookimpl


@dataclass
class JsonlConfig(ComponentConfig):
    """Where the lines go."""

    file: str = "metrics.jsonl"  # in the run's folder


class JsonlTracker:
    """Appends ``{"step": 10, "loss": 2.3, ...}``.

    A run that was resumed repeats steps: what the file says of them, and after them, is dropped, so that
    it holds one line a step.
    """

    def __init__(self, config: JsonlConfig, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / config.file
        self._last: int | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line, at once: whoever watches the file sees it."""
        if self._last is None and self.path.exists():
            self._keep_before(step)
        self._last = step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Nothing is left to write."""

    def _keep_before(self, step: int) -> None:
        kept = []
        for line in self.path.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except ValueError:  # the line that a crash cut short
                continue
        aside = self.path.with_name(f".{self.path.name}.new")
        aside.write_text("".join(kept), "utf-8")
        aside.replace(self.path)


@hookimpl
def register_trackers(registry: Registry[Tracker]) -> None:
    """Offer ``jsonl``."""
    registry.add("jsonl", JsonlTracker, JsonlConfig)
