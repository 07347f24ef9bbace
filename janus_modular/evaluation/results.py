"""Results of an evaluation: the table that is printed, and results.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from janus_modular.atomic_writes import write_text
from janus_modular.config import to_plain
from janus_modular.evaluation.ledger import write_errors
from janus_modular.evaluation.published import published_results
from janus_modular.evaluation.schema import EvalConfig

PACKAGES = ("janus-modular", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy")

T = TypeVar("T")


@dataclass(frozen=True)
class Results:
    """Metrics by group (``all``, ``category X``) and name, and the settings of the sampler."""

    metrics: Mapping[str, Mapping[str, float]]
    settings: Mapping[str, Any]

    def table(self) -> Table:
        """Return the metrics as a table with a row for each group."""
        table = Table()
        table.add_column("")
        names = list(dict.fromkeys(name for group in self.metrics.values() for name in group))
        for name in names:
            table.add_column(name, justify="right")
        for group, metrics in self.metrics.items():
            table.add_row(group, *(_formatted(metrics[name]) if name in metrics else "" for name in names))
        return table

    def record(self, config: EvalConfig, model: str, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "evaluate": config.evaluate,
            "metrics": {
                group: {name: value if isfinite(value) else str(value) for name, value in metrics.items()}
                for group, metrics in self.metrics.items()
            },
            "published": [asdict(result) for result in published_results(config.evaluate)],
            "config": to_plain(config),
            "settings": dict(self.settings),
            "model": {"path": model, **identity},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), **dict(_versions())},
        }


def write_results(out: Path, record: Mapping[str, Any]) -> None:
    """Write results.json into a folder, in place of that of an earlier evaluation.

    Raises:
        EvaluationError: the file cannot be written.
    """
    with write_errors(out / "results.json"):
        write_text(out / "results.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield up to ``size`` items at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _formatted(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
