"""The report of a demo: one HTML file that needs no other file."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from janus_modular.atomic_writes import write_text
from janus_modular.config import to_plain, to_yaml
from janus_plugins.demo.evaluation import THRESHOLDS, Answers, Drawings, confusion
from janus_plugins.demo.labelled_images import LabelledImages
from janus_plugins.demo.post_training import ReportSection
from janus_plugins.demo.schema import DemoConfig

TEMPLATE = Path(__file__).with_name("report.html")
STRIP_LENGTH = 12  # images of a strip


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
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(**template_values(output, results))
    path = output / "report.html"
    write_text(path, page)
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
            "settings": config.drawings[name],
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
        "thresholds": THRESHOLDS,
        "seconds": results.seconds,
        "seed": config.seed,
        "sizes": {"train": len(results.train), "held_out": len(held_out)},
        "grids": grids,
        "examples": _examples(results),
        "wrong": int((~answers.correct).sum()),
        "confusion": confusion_matrix(table, held_out.names),
        "curves": loss_curves(_read_logs(output, config)),
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


def _read_logs(output: Path, config: DemoConfig) -> dict[str, list[dict[str, float]]]:
    """Return the logged metrics of each phase, in the order of training."""
    logs = {}
    for name in ("classifier", "tokenizer", "encoder", *config.stages):
        file = output / "phases" / name / "metrics.jsonl"
        if file.is_file():
            logs[name] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return logs


INK = "#1f2933"
CURVE_COLOURS = {"loss/text": "#2563eb", "loss/image": "#ea580c"}


def strip(images: Sequence[Image.Image], length: int = STRIP_LENGTH, gap: int = 3) -> NDArray[np.uint8]:
    """Lay up to ``length`` images of one size side by side on white; return the grey values (H, W)."""
    images = list(images)[:length]
    width, height = images[0].size
    canvas = Image.new("L", (length * (width + gap) - gap, height + gap), "white")
    for i, image in enumerate(images):
        canvas.paste(image.convert("L"), (i * (width + gap), 0))
    return np.asarray(canvas)


def enlarge(image: Image.Image, times: int = 2) -> Image.Image:
    """Enlarge an image of small images."""
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def data_uri(greys: NDArray[np.uint8]) -> str:
    """Return grey values (H, W) as a PNG in a data URI, enlarged for high-resolution screens."""
    file = BytesIO()
    enlarge(Image.fromarray(greys)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Plot the losses of each phase over its steps, a panel for each phase; return a data URI."""
    columns = 2
    rows = max(1, -(-len(logs) // columns))
    figure = Figure(figsize=(7.2, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (phase, lines) in zip(panels, logs.items(), strict=False):
        for name in sorted({name for line in lines for name in line if name.startswith("loss/")}):
            points = [(line["step"], line[name]) for line in lines if name in line]
            panel.plot(
                *zip(*points, strict=True),
                label=name.removeprefix("loss/"),
                color=CURVE_COLOURS.get(name),
                lw=1.4,
            )
        panel.set_title(phase, loc="left", fontsize=10, color=INK)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
        _style(panel)
    for panel in panels[len(logs) :]:
        panel.set_axis_off()
    return _svg_uri(figure)


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
    _style(panel)
    return _svg_uri(figure)


def _style(panel: Any) -> None:
    panel.tick_params(colors="#52606d", labelsize=8, length=2)
    for side, line in panel.spines.items():
        line.set_visible(side in ("left", "bottom"))
        line.set_color("#cbd2d9")


def _svg_uri(figure: Figure) -> str:
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(file.getvalue()).decode()}"
