"""Writes what a demo learned as one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from janus_modular.atomic_writes import write_text
from janus_modular.config import to_plain, to_yaml
from janus_plugins.demo import plots
from janus_plugins.demo.asking import Answers, Drawings
from janus_plugins.demo.images import LabelledImages
from janus_plugins.demo.measures import BARS, confusion
from janus_plugins.demo.post_training import ReportSection
from janus_plugins.demo.schema import DemoConfig

TEMPLATE = Path(__file__).with_name("report.html")
ACROSS = 12  # drawings of a class that are shown


@dataclass
class Evidence:
    """All that a report shows."""

    config: DemoConfig
    figures: Mapping[str, float]
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
    sheet = np.concatenate([plots.strip(_of(first, i), ACROSS) for i in range(len(names))])
    plots.grow(Image.fromarray(sheet)).save(output / "drawings.png")
    return path


def content(output: Path, evidence: Evidence) -> dict[str, Any]:
    """Return what the template shows; images as data URIs."""
    config, held_out = evidence.config, evidence.held_out
    table = confusion(evidence.answers.truth, evidence.answers.found, len(held_out.names))
    grids = [
        {
            "accuracy": evidence.figures[name],
            "settings": config.drawings[name],
            "rows": [
                {
                    "name": called,
                    "prompt": next(p for p, k in zip(some.prompts, some.labels, strict=True) if k == label),
                    "strip": plots.as_uri(plots.strip(_of(some, label), ACROSS)),
                }
                for label, called in enumerate(held_out.names)
            ],
        }
        for name, some in evidence.drawings.items()
    ]
    shown = np.linspace(0, len(held_out.images) - 1, ACROSS).astype(int)
    return {
        "figures": evidence.figures,
        "bars": BARS,
        "seconds": evidence.seconds,
        "seed": config.seed,
        "sizes": {"learned from": len(evidence.train), "held out": len(held_out)},
        "grids": grids,
        "examples": _examples(evidence),
        "wrong": round((1 - evidence.answers.accuracy) * len(held_out)),
        "confusion": plots.confusion_matrix(table, held_out.names),
        "curves": plots.curves(_logs(output, config)),
        "originals": plots.as_uri(plots.strip([held_out.images[i] for i in shown], ACROSS)),
        "restored": plots.as_uri(plots.strip([evidence.restored[i] for i in shown], ACROSS)),
        "sections": [
            {
                "title": section.title,
                "text": section.text,
                "columns": section.columns,
                "rows": section.rows,
                "strips": {
                    caption: plots.as_uri(plots.strip(images, ACROSS))
                    for caption, images in section.strips.items()
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
            "image": plots.as_uri(plots.strip([held_out.images[i]], 1)),
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
        file = output / "phases" / name / "figures.jsonl"
        if file.is_file():
            logs[name] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return logs
