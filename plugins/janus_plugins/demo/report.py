"""Writes what a demo learned as one HTML file that needs nothing beside it."""

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
ACROSS = 12  # drawings of a class that are shown


@dataclass
class Evidence:
    """All that a report shows."""

    config: DemoConfig
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]  # by step
    answers: Answers
    drawings: Mapping[str, Drawings]  # by the name of their accuracy
    restored: Sequence[Image.Image]  # held-out images through the image tokenizer
    train: LabelledImages
    held_out: LabelledImages
    sections: Sequence[ReportSection] = ()  # of the post-training steps


def write_report(output: Path, evidence: Evidence) -> Path:
    """Write ``report.html``, and the first grid of drawings as ``drawings.png``; return the report's path."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text("utf-8")).render(**content(output, evidence))
    path = output / "report.html"
    write_text(path, page)
    first = next(iter(evidence.drawings.values()))
    names = evidence.held_out.names
    sheet = np.concatenate([strip(_of(first, i), ACROSS) for i in range(len(names))])
    grow(Image.fromarray(sheet)).save(output / "drawings.png")
    return path


def content(output: Path, evidence: Evidence) -> dict[str, Any]:
    """Return what the template shows; images as data URIs."""
    config, held_out = evidence.config, evidence.held_out
    table = confusion(evidence.answers.truth, evidence.answers.found, len(held_out.names))
    grids = [
        {
            "accuracy": evidence.metrics[name],
            "settings": config.drawings[name],
            "rows": [
                {
                    "name": called,
                    "prompt": next(p for p, k in zip(some.prompts, some.labels, strict=True) if k == label),
                    "strip": as_uri(strip(_of(some, label), ACROSS)),
                }
                for label, called in enumerate(held_out.names)
            ],
        }
        for name, some in evidence.drawings.items()
    ]
    shown = np.linspace(0, len(held_out.images) - 1, ACROSS).astype(int)
    return {
        "figures": evidence.metrics,
        "bars": THRESHOLDS,
        "seconds": evidence.seconds,
        "seed": config.seed,
        "sizes": {"learned from": len(evidence.train), "held out": len(held_out)},
        "grids": grids,
        "examples": _examples(evidence),
        "wrong": round((1 - evidence.answers.accuracy) * len(held_out)),
        "confusion": confusion_matrix(table, held_out.names),
        "curves": curves(_logs(output, config)),
        "originals": as_uri(strip([held_out.images[i] for i in shown], ACROSS)),
        "restored": as_uri(strip([evidence.restored[i] for i in shown], ACROSS)),
        "sections": [
            {
                "title": section.title,
                "text": section.text,
                "columns": section.columns,
                "rows": section.rows,
                "strips": {
                    caption: as_uri(strip(images, ACROSS)) for caption, images in section.strips.items()
                },
            }
            for section in evidence.sections
        ],
        "settings": to_yaml(to_plain(config)),
    }


def _of(drawings: Drawings, label: int) -> list[Image.Image]:
    return [one for one, asked in zip(drawings.images, drawings.labels, strict=True) if asked == label]


def _examples(evidence: Evidence, count: int = 12) -> list[dict[str, Any]]:
    """Choose answers to show: mistakes first, for they teach most, then others evenly."""
    answers, held_out = evidence.answers, evidence.held_out
    right = np.array([said == truth for said, truth in zip(answers.found, answers.truth, strict=True)])
    wrong = np.flatnonzero(~right)[: count // 3]
    others = np.flatnonzero(right)
    chosen = (
        [*wrong, *others[np.linspace(0, len(others) - 1, count - len(wrong)).astype(int)]]
        if len(others)
        else wrong
    )
    return [
        {
            "image": as_uri(strip([held_out.images[i]], 1)),
            "question": answers.questions[i],
            "answer": answers.answers[i],
            "right": bool(right[i]),
            "truth": held_out.names[int(answers.truth[i])],
        }
        for i in chosen
    ]


def _logs(output: Path, config: DemoConfig) -> dict[str, list[dict[str, float]]]:
    """Read what the phases logged, in the order that they ran."""
    logs = {}
    for name in ("classifier", "tokenizer", "encoder", *config.stages):
        file = output / "phases" / name / "metrics.jsonl"
        if file.is_file():
            logs[name] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return logs


INK, ACCENT = "#1f2933", "#2563eb"
COLOURS = {"loss/text": "#2563eb", "loss/image": "#ea580c"}  # of curves with names that stages share


def strip(images: Sequence[Image.Image], across: int, gap: int = 3) -> NDArray[np.uint8]:
    """Lay up to ``across`` images of one size side by side on white."""
    images = list(images)[:across]
    width, height = images[0].size
    sheet = Image.new("L", (across * (width + gap) - gap, height + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image.convert("L"), (i * (width + gap), 0))
    return np.asarray(sheet)


def grow(image: Image.Image, times: int = 2) -> Image.Image:
    """Enlarge a sheet of small images."""
    return image.resize((image.width * times, image.height * times), Image.Resampling.BICUBIC)


def as_uri(greys: NDArray[np.uint8]) -> str:
    """Return greys (H, W) as a PNG in a data URI, enlarged for screens that show more than a pixel each."""
    file = BytesIO()
    grow(Image.fromarray(greys)).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def curves(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Draw the losses of each phase over its steps, a small panel each."""
    columns = 2
    rows = max(1, -(-len(logs) // columns))
    figure = Figure(figsize=(7.2, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (phase, lines) in zip(panels, logs.items(), strict=False):
        for name in sorted({name for line in lines for name in line if name.startswith("loss/")}):
            points = [(line["step"], line[name]) for line in lines if name in line]
            panel.plot(
                *zip(*points, strict=True), label=name.removeprefix("loss/"), color=COLOURS.get(name), lw=1.4
            )
        panel.set_title(phase, loc="left", fontsize=10, color=INK)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8)
        _plain(panel)
    for panel in panels[len(logs) :]:
        panel.set_axis_off()
    return _svg(figure)


def confusion_matrix(table: NDArray[np.int64], names: Sequence[str]) -> str:
    """Draw counts (classes, classes + 1): rows are what was shown, columns what was answered."""
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
    panel.set_xlabel("answered", color=INK)
    panel.set_ylabel("shown", color=INK)
    _plain(panel)
    return _svg(figure)


def _plain(panel: Any) -> None:
    panel.tick_params(colors="#52606d", labelsize=8, length=2)
    for side, line in panel.spines.items():
        line.set_visible(side in ("left", "bottom"))
        line.set_color("#cbd2d9")


def _svg(figure: Figure) -> str:
    file = BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{b64encode(file.getvalue()).decode()}"
