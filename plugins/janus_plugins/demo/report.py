"""The report of a demo: one HTML file that needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from janus_modular.config import to_plain, to_yaml
from janus_plugins.demo.evaluation import Answers, Drawings, confusion
from janus_plugins.demo.figures import (
    INK,
    STRIP_LENGTH,
    data_uri,
    enlarge,
    loss_curves,
    png_uri,
    read_logs,
    strip,
    style,
    svg_uri,
    write_page,
)
from janus_plugins.demo.labelled_images import LabelledImages
from janus_plugins.demo.post_training import ReportSection
from janus_plugins.demo.schema import METRICS, DemoConfig

LARGER_RUN = Path(__file__).with_name("larger_run.png")
"""Drawings of a run of ``make emoji``, which the report shows beside its own."""


@dataclass
class Results:
    """Everything that a report shows."""

    config: DemoConfig
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]  # by step
    answers: Answers
    drawings: Mapping[str, Drawings]  # by the name of their accuracy
    reconstructed: Sequence[Image.Image]  # held-out images, encoded and decoded by the image tokenizer
    train: LabelledImages
    held_out: LabelledImages
    sections: Sequence[ReportSection] = ()  # of the post-training steps


def write_report(output: Path, results: Results) -> Path:
    """Write ``report.html``, the first grid of drawings as ``drawings.png``, and the first held-out image as
    ``example.png``; return the report's path.
    """
    path = output / "report.html"
    write_page("report.html", template_values(output, results), path)
    first = next(iter(results.drawings.values()))
    labels = range(len(results.held_out.names))
    grid = np.concatenate([strip(first.of_class(label)) for label in labels])
    enlarge(Image.fromarray(grid)).save(output / "drawings.png")
    results.held_out.images[0].save(output / "example.png")
    return path


def template_values(output: Path, results: Results) -> dict[str, Any]:
    """Return the values of the template; images are data URIs."""
    config, held_out, answers = results.config, results.held_out, results.answers
    table = confusion(answers.labels, answers.predicted, len(held_out.names))
    grids = [
        {
            "accuracy": results.metrics[name],
            "settings": ", ".join(f"{key} {value}" for key, value in config.drawings[name].items()),
            "rows": [
                {
                    "name": class_name,
                    "prompt": drawings.prompts[drawings.labels.tolist().index(label)],
                    "strip": data_uri(strip(drawings.of_class(label))),
                }
                for label, class_name in enumerate(held_out.names)
            ],
        }
        for name, drawings in results.drawings.items()
    ]
    indices = np.linspace(0, len(held_out.images) - 1, STRIP_LENGTH).astype(int)
    return {
        "metrics": results.metrics,
        "descriptions": {name: text for name, text in METRICS.items() if name in results.metrics},
        "thresholds": config.thresholds,
        "seconds": results.seconds,
        "seed": config.seed,
        "sizes": {"train": len(results.train), "held_out": len(held_out)},
        "grids": grids,
        "examples": _examples(results),
        "wrong": int((~answers.correct).sum()),
        "confusion": confusion_matrix(table, held_out.names),
        "curves": loss_curves(read_logs(output, config)),
        "originals": data_uri(strip([held_out.images[i] for i in indices])),
        "reconstructed": data_uri(strip([results.reconstructed[i] for i in indices])),
        "sections": [
            {
                "title": section.title,
                "text": section.text,
                "columns": section.columns,
                "rows": section.rows,
                "strips": {caption: data_uri(strip(images)) for caption, images in section.strips.items()},
            }
            for section in results.sections
        ],
        "settings": to_yaml(to_plain(config)),
        "larger_run": png_uri(LARGER_RUN.read_bytes()),
    }


def _examples(results: Results, count: int = 12) -> list[dict[str, Any]]:
    """Return answers to show: up to a third are mistakes, which come first; the others are spread evenly."""
    answers, held_out = results.answers, results.held_out
    correct = np.flatnonzero(answers.correct)
    indices = np.flatnonzero(~answers.correct)[: count // 3].tolist()
    if len(correct):
        evenly = np.linspace(0, len(correct) - 1, count - len(indices)).astype(int)
        indices += correct[evenly].tolist()
    return [
        {
            "image": data_uri(strip([held_out.images[i]], 1)),
            "question": answers.questions[i],
            "answer": answers.answers[i],
            "correct": bool(answers.correct[i]),
            "label": held_out.names[int(answers.labels[i])],
        }
        for i in indices
    ]


def confusion_matrix(table: NDArray[np.int64], names: Sequence[str]) -> str:
    """Plot counts (classes, classes + 1): rows are labels, columns predictions; return a data URI."""
    if not table[:, -1].any():
        table = table[:, :-1]
    labels = [*names, "none"][: table.shape[1]]
    figure = Figure(figsize=(5.4, 4.8), layout="constrained")
    panel = figure.subplots()
    share = table / table.sum(1, keepdims=True).clip(1)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(table):
        if count:
            colour = "white" if share[row, column] > 0.5 else INK
            panel.text(column, row, str(count), ha="center", va="center", fontsize=9, color=colour)
    panel.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=9)
    panel.set_yticks(range(len(names)), list(names), fontsize=9)
    panel.set_xlabel("predicted", color=INK)
    panel.set_ylabel("label", color=INK)
    style(panel)
    return svg_uri(figure)
