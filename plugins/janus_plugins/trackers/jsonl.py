"""Metrics as lines of JSON, one for each logged step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from janus_modular import ComponentConfig, Registry, Tracker, hookimpl
from janus_plugins.trackers.run_files import check_run_file


@dataclass
class JsonlConfig(ComponentConfig):
    """The file of the lines."""

    file: str = "metrics.jsonl"  # in the run's folder

    def __post_init__(self) -> None:
        """Check that the run itself does not write the file."""
        check_run_file("file", self.file)


class JsonlTracker:
    """Appends lines such as ``{"step": 10, "loss": 2.3, ...}``.

    A resumed run repeats steps: their earlier lines are dropped, so that the file has one line a step.
    """

    def __init__(self, config: JsonlConfig, folder: Path) -> None:
        self.path = folder / config.file.strip()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last: int | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line at once, so that the file can be followed during training."""
        if self._last is None and self.path.exists():
            self._keep_before(step)
        self._last = step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Do nothing: every line is written already."""

    def _keep_before(self, step: int) -> None:
        kept = []
        for line in self.path.read_text("utf-8").splitlines():
            try:
                if json.loads(line)["step"] < step:
                    kept.append(line + "\n")
            except ValueError:  # a line that a crash cut short
                continue
        temporary = self.path.with_name(f".{self.path.name}.new")
        temporary.write_text("".join(kept), "utf-8")
        temporary.replace(self.path)


@hookimpl
def register_trackers(registry: Registry[Tracker]) -> None:
    """Register ``jsonl``."""
    registry.add("jsonl", JsonlTracker, JsonlConfig)
