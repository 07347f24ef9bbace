"""The report of a run on named images: what was learned over the steps, and of which names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from janus_modular.config import to_plain, to_yaml
from janus_modular.training.run_folder import VALIDATION, step_folders
from janus_plugins.demo.figures import (
    STRIP_LENGTH,
    captioned,
    data_uri,
    loss_curves,
    read_logs,
    strip,
    write_page,
)
from janus_plugins.demo.labelled_images import LabelledImages
from janus_plugins.demo.names import NamedResults
from janus_plugins.demo.post_training import ReportSection
from janus_plugins.demo.schema import DemoConfig

METRICS = {
    "read_exactly": "answers that are the name, word for word",
    "words_read": "words of answers against words of names (F1)",
    "drawn_nearest": "drawings whose nearest image, of all that were asked for, is that of their name",
    "drawn_closer": "images of other names that are further from a drawing than its own",
}


@dataclass
class NamesReport:
    """Everything that the report shows."""

    config: DemoConfig
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]  # by step
    results: Mapping[str, NamedResults]  # of trained and of held-out names
    reconstructed: Sequence[Image.Image]  # held-out images, encoded and decoded by the image tokenizer
    train: LabelledImages
    held_out: LabelledImages
    sections: Sequence[ReportSection] = ()  # of the post-training steps


def write_names_report(output: Path, report: NamesReport) -> Path:
    """Write ``report.html``, and the drawings of the config's prompts as ``drawings.png``; return the
    report's path.
    """
    steps = validated_steps(output, report.config)
    write_page("names_report.html", template_values(output, report, steps), output / "report.html")
    if steps and steps[-1].drawings:
        captioned(steps[-1].drawings, steps[-1].captions).save(output / "drawings.png")
    return output / "report.html"


@dataclass
class ValidatedStep:
    """The drawings and the answers of a step of a stage, from the run's folder."""

    stage: str
    step: int
    captions: list[str]  # of the drawings: their prompts
    drawings: list[Image.Image]
    answers: list[str]


def validated_steps(output: Path, config: DemoConfig) -> list[ValidatedStep]:
    """Return the validated steps of all stages, in the order of training."""
    shared = config.common.get("validation", {})
    steps = []
    for stage, settings in config.stages.items():
        prompts = settings.get("validation", shared).get("prompts", [])
        for folder in step_folders(output / "phases" / stage / VALIDATION):
            files = [folder / f"drawing-{i}.png" for i in range(len(prompts))]
            answers = folder / "answers.json"
            replies = json.loads(answers.read_text("utf-8")) if answers.is_file() else []
            steps.append(
                ValidatedStep(
                    stage,
                    int(folder.name.rpartition("-")[-1]),
                    list(prompts),
                    [Image.open(file).convert("RGB") for file in files if file.is_file()],
                    [reply["answer"] for reply in replies],
                )
            )
    return steps


def template_values(output: Path, report: NamesReport, steps: Sequence[ValidatedStep]) -> dict[str, Any]:
    """Return the values of the template; images are data URIs."""
    config = report.config
    indices = [i * (len(report.reconstructed) - 1) // (STRIP_LENGTH - 1) for i in range(STRIP_LENGTH)]
    return {
        "metrics": report.metrics,
        "descriptions": METRICS,
        "seconds": report.seconds,
        "seed": config.seed,
        "processes": config.processes,
        "sizes": {"train": len(report.train), "held_out": len(report.held_out), "asked": config.count},
        "drawing": ", ".join(f"{key} {value}" for key, value in next(iter(config.drawings.values())).items()),
        "captions": steps[-1].captions if steps else [],
        "steps": [
            {
                "name": f"{step.stage}, step {step.step}",
                "strip": data_uri(strip(step.drawings)) if step.drawings else "",
                "answers": step.answers,
            }
            for step in steps
        ],
        "results": {split.replace("_", " "): _rows(results) for split, results in report.results.items()},
        "curves": loss_curves(read_logs(output, config)),
        "originals": data_uri(strip([report.held_out.images[i] for i in indices])),
        "reconstructed": data_uri(strip([report.reconstructed[i] for i in indices])),
        "sections": [
            {
                "title": section.title,
                "text": section.text,
                "columns": section.columns,
                "rows": section.rows,
                "strips": {caption: data_uri(strip(images)) for caption, images in section.strips.items()},
            }
            for section in report.sections
        ],
        "settings": to_yaml(to_plain(config)),
    }


def _rows(results: NamedResults, count: int = 24) -> list[dict[str, str]]:
    """Return the first results: the real image beside the drawing, the name and the answer."""
    columns = zip(
        results.names, results.images, results.drawings, results.prompts, results.answers, strict=True
    )
    return [
        {"name": name, "pair": data_uri(strip([image, drawing], 2)), "prompt": prompt, "answer": answer}
        for name, image, drawing, prompt, answer in list(columns)[:count]
    ]
