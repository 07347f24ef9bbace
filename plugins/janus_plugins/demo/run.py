"""The whole demo on a page: train the parts, train the stages, ask, let it draw, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from janus_modular.atomic_writes import write_text
from janus_modular.config import to_plain, to_yaml
from janus_modular.errors import TrainingError
from janus_modular.interfaces import ImageTokenizer
from janus_modular.janus import Janus
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.training.run_folder import LOCK, check_output, check_single_process, run_folder
from janus_plugins.demo.evaluation import THRESHOLDS, Drawings, ask, draw, flat, nearest, psnr, spread
from janus_plugins.demo.labelled_images import LabelledImages, as_pixels
from janus_plugins.demo.networks import Classifier
from janus_plugins.demo.phases import Demo
from janus_plugins.demo.post_training import find_steps
from janus_plugins.demo.report import Evidence, write_report
from janus_plugins.demo.schema import DemoConfig

MARK = "demo.yaml"
"""What a folder of this demo's making holds: its settings."""

WHY = {
    "classifier": "an independent judge of drawings, on the real images; no part of Janus",
    "tokenizer": "images to codes and back: what the drawing path will predict",
    "encoder": "features to read images by, from captions alone (sigmoid contrastive loss)",
    "stages": "words first (in a random, frozen decoder, adaptors would learn next to nothing), then Janus'"
    " three stages: adaptors and image head; the decoder too; the understanding encoder too",
    "asking": "about images that nothing above has seen",
    "drawing": "from words, with and without guidance",
}


def run_demo(
    config: DemoConfig, output: Path, *, quiet: bool = False, plugins: Plugins | None = None
) -> dict[str, Any]:
    """Train, measure and report; return what ``report.json`` holds.

    A demo of the same settings that was interrupted in ``output`` goes on: its finished phases are kept.

    Raises:
        TrainingError: ``output`` holds something that is not a demo's, another process writes it, or a
            launcher started several processes.
        ConfigError: ``post_training_steps`` names a step that no installed package provides.
    """
    with demo_folder(output):
        return _run(config, output, plugins or default_plugins(), quiet)


def _run(config: DemoConfig, output: Path, plugins: Plugins, quiet: bool) -> dict[str, Any]:
    """Run a demo in its folder, which is this process's own."""
    post_training = find_steps(config.post_training_steps)
    if prepare_folder(output, to_yaml(config), result="report.json") and not quiet:
        Console(stderr=True).print(f"going on with the demo in {output}; its finished phases are kept")
    demo = Demo(config, output, plugins, quiet)
    steps = Steps(quiet)
    began = time.perf_counter()
    train, held_out = demo.open(config.images), demo.open(config.held_out)
    with steps("classifier"):
        classifier = demo.classifier()
    with steps("tokenizer"):
        tokenizer = demo.tokenizer()
    with steps("encoder"):
        demo.encoder()
    with steps("stages"):
        folder = demo.stages()
    janus = Janus.from_pretrained(folder, device="cpu")
    with steps("asking"):
        answers = ask(janus, held_out, config.seed)
    with steps("drawing"):
        drawings = {
            name: draw(janus, held_out, how, config.count, config.seed)
            for name, how in config.drawings.items()
        }

    sections = []
    for name, step in post_training.items():
        with steps(name, getdoc(step)):
            sections.append(step(folder, output, **_drawing_arguments(held_out, config)))

    restored, used = through(tokenizer, held_out)
    metrics = {"reading_accuracy": answers.accuracy}
    metrics |= {name: recognised(classifier, some) for name, some in drawings.items()}
    metrics["classifier_accuracy"] = float(
        np.mean(classifier.classify(held_out.images).numpy() == held_out.labels)
    )
    metrics |= variety(next(iter(drawings.values())), train, held_out)
    metrics["codes_used"] = used / max(tokenizer.codebooks)
    metrics["psnr_db"] = psnr(flat(held_out.images), flat(restored))
    for section in sections:
        metrics |= section.metrics
    metrics["seconds"] = time.perf_counter() - began
    report = {name: round(value, 4) for name, value in metrics.items()} | settings_of(config)
    write_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    write_report(
        output,
        Evidence(config, metrics, steps.seconds, answers, drawings, restored, train, held_out, sections),
    )
    if not quiet:
        Console().print(table(metrics))
        Console().print(f"report: {output / 'report.html'}\nmodel:  {folder}")
    return report


class Steps:
    """Says what is done next and why, and keeps how long it took."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, why: str | None = None) -> Iterator[None]:
        """Time a step of the demo."""
        self.console.print(f"[bold]{name}[/]: {why or WHY[name]}")
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def _drawing_arguments(held_out: LabelledImages, config: DemoConfig) -> dict[str, Any]:
    """Return a prompt for each class, and the settings of the first drawings, as a step takes them."""
    rng = np.random.default_rng(config.seed)
    drawing = next(iter(config.drawings.values()))
    return {
        "prompts": [held_out.prompt(label, rng) for label in range(len(held_out.names))],
        "guidance": drawing.guidance,
        "temperature": drawing.temperature,
        "seed": config.seed,
    }


@torch.inference_mode()
def through(tokenizer: ImageTokenizer, held_out: LabelledImages) -> tuple[list[Image.Image], int]:
    """Send images through the tokenizer and back; return them, and how many codes they used."""
    low, high = tokenizer.value_range
    pixels = as_pixels(held_out.images)
    codes = tokenizer.encode(low + pixels / 255 * (high - low))
    height, width = pixels.shape[-2:]
    painted = tokenizer.decode(codes, height=height, width=width)
    restored = ((painted - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
    images = [Image.fromarray(one) for one in restored.permute(0, 2, 3, 1).numpy()]
    return images, len(codes.unique())


def recognised(classifier: Classifier, drawings: Drawings) -> float:
    """Return the share of drawings in which the judge sees what was asked for."""
    return float(np.mean(classifier.classify(drawings.images).numpy() == drawings.labels))


def variety(drawings: Drawings, train: LabelledImages, held_out: LabelledImages) -> dict[str, float]:
    """Compare drawings with real held-out images: how far apart they are, how far from what was learned."""
    drawn, real, known = (flat(one.images) for one in (drawings, held_out, train))
    return {
        "diversity_ratio": spread(drawn, drawings.labels) / spread(real, held_out.labels),
        "nearest_ratio": nearest(drawn, known) / nearest(real, known),
    }


def settings_of(config: DemoConfig) -> dict[str, Any]:
    """Return a config as one level of dotted keys."""
    return dict(_flat(to_plain(config), "settings"))


def table(metrics: Mapping[str, float]) -> Table:
    """Return the figures with what they should be, for printing."""
    view = Table("figure", "value", "at least", "", title="What it learned")
    for bar in THRESHOLDS:
        value = metrics[bar.name]
        met = "[green]yes[/]" if value >= bar.least else "[red]no[/]"
        view.add_row(
            bar.name, f"{value:.3f}", f"{bar.least:g}" if bar.least else "", met if bar.least else ""
        )
    for name in sorted(set(metrics) - {bar.name for bar in THRESHOLDS}):
        view.add_row(name, f"{metrics[name]:.3g}", "", "")
    return view


@contextmanager
def demo_folder(output: Path) -> Iterator[None]:
    """Hold the folder of a demo against other processes, from the start to the report.

    Raises:
        TrainingError: another process writes it, it cannot be written, or a launcher started several
            processes.
    """
    check_single_process()
    check_output(output, "--out FOLDER")
    with run_folder(output):
        yield


def prepare_folder(output: Path, settings: str, *, result: str) -> bool:
    """Prepare ``output``, which `demo_folder` holds; return True if a demo of these settings was interrupted.

    An interrupted demo is the mark of these settings without the file ``result``. What any other demo
    left is removed.

    Raises:
        TrainingError: ``output`` holds something else.
    """
    mark = output / MARK
    if any(path.name != LOCK for path in output.iterdir()) and not mark.is_file():
        raise TrainingError(f"{output} holds something that is not a demo's: choose another --out FOLDER.")
    if mark.is_file() and mark.read_text("utf-8") == settings and not (output / result).exists():
        return True
    for old in ("phases", "parts", "model", "bundle"):
        shutil.rmtree(output / old, ignore_errors=True)
    (output / result).unlink(missing_ok=True)
    write_text(mark, settings)
    return False


def _flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}")
    else:
        yield path, tree
