"""The whole demo on a page: train the stages, evaluate, run the post-training steps, report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import getdoc
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from janus_modular.atomic_writes import write_text
from janus_modular.config import flatten, to_plain, to_yaml
from janus_modular.errors import ConfigError, PromptError, TrainingError
from janus_modular.janus import Janus
from janus_modular.model.build import build_model
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.samplers import with_settings
from janus_modular.training.processes import check_single_process
from janus_modular.training.run_folder import LOCK, check_output, run_folder
from janus_plugins.demo.evaluation import (
    ask,
    draw,
    psnr,
    recognised,
    reconstruct,
    to_grey,
    variety,
)
from janus_plugins.demo.labelled_images import LabelledImages
from janus_plugins.demo.names import read_and_draw, to_colours
from janus_plugins.demo.names_report import NamesReport, write_names_report
from janus_plugins.demo.phases import Demo
from janus_plugins.demo.post_training import PostTrainingStep, ReportSection, find_steps
from janus_plugins.demo.report import Results, write_report
from janus_plugins.demo.schema import METRICS, DemoConfig

RESERVED = ("seed", "numbers", "first", "prefix")
"""Settings of image samplers that follow from the demo's seed and prompts."""

SETTINGS = "demo.yaml"
"""The file that marks the folder of a demo: its settings."""

PROMPTS = 10
"""The most prompts that a post-training step gets: one for each of the first names."""

DESCRIPTIONS = {
    "classifier": "an independent classifier of the real images, to evaluate drawings; no part of Janus",
    "stages": "the image tokenizer, on images alone; the understanding encoder, on captions; the decoder, on"
    " text (with a random, frozen decoder, adaptors would learn next to nothing); then Janus' three stages:"
    " adaptors and image head; the decoder too; the understanding encoder too",
    "reading": "questions about held-out images",
    "names": "questions about images, and drawings of their names: trained names, and held-out names",
    "drawing": "images from prompts, with and without guidance",
}


def run_demo(
    config: DemoConfig,
    output: Path,
    *,
    quiet: bool = False,
    plugins: Plugins | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Train, evaluate and report; return the content of ``report.json``.

    An interrupted demo of the same settings in ``output`` is continued: its finished phases are kept. A
    finished one is left as it is, and ``force`` removes any.

    Raises:
        TrainingError: ``output`` holds a demo of other settings or other files, another process writes it,
            or a launcher started several processes.
        ConfigError: ``post_training_steps`` names a step that no installed package provides, or ``drawings``
            a setting that the model's image sampler does not have.
    """
    with demo_folder(output):
        return _run(config, output, plugins or default_plugins(), quiet, force)


def _run(config: DemoConfig, output: Path, plugins: Plugins, quiet: bool, force: bool) -> dict[str, Any]:
    """Run a demo in its folder, which this process has locked."""
    post_training = find_steps(config.post_training_steps)
    check_drawings(config, plugins)
    settings = to_yaml(config)
    if not force and is_finished(output, settings, result="report.json"):
        if not quiet:
            Console(stderr=True).print(
                f"the demo in {output} is finished: {output / 'report.html'}\nTo train it again: --force",
                soft_wrap=True,
            )
        return json.loads((output / "report.json").read_text("utf-8"))
    if prepare_folder(output, settings, result="report.json", force=force) and not quiet:
        Console(stderr=True).print(f"continuing the demo in {output}; its finished phases are kept")
    demo = Demo(config, output, plugins, quiet)
    timed = StepTimer(quiet)
    began = time.perf_counter()
    run = _run_names if config.classifier is None else _run_classes
    metrics, write = run(demo, timed, post_training)
    metrics["seconds"] = time.perf_counter() - began
    report = {name: round(value, 4) for name, value in metrics.items()} | flat_settings(config)
    write_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    write()
    if not quiet:
        Console().print(metrics_table(metrics, config.thresholds))
        Console().print(f"report: {output / 'report.html'}\nmodel:  {output / 'model'}")
    return report


def check_drawings(config: DemoConfig, plugins: Plugins) -> None:
    """Check the settings of drawings before anything is trained.

    Raises:
        ConfigError: the model's image sampler does not have a setting, or refuses its value.
    """
    sampler = build_model(config.model, on_meta=True, plugins=plugins).image_sampler
    for name, settings in config.drawings.items():
        if own := [key for key in RESERVED if key in settings]:
            raise ConfigError(f"drawings.{name}: {', '.join(own)}: set by the demo; leave it out.")
        try:
            with_settings(plugins, "image_samplers", sampler, {**settings, "seed": config.seed})
        except PromptError as error:
            raise ConfigError(f"drawings.{name}: {error}") from error


Evaluated = tuple[dict[str, float], Callable[[], Path]]
"""The metrics of a demo, and what writes its report of them."""


def _run_classes(demo: Demo, timed: StepTimer, post_training: Mapping[str, PostTrainingStep]) -> Evaluated:
    """Train and evaluate a model of labelled images, whose classes an independent classifier knows."""
    config = demo.config
    train, held_out = demo.open(config.images), demo.open(config.held_out)
    with timed("classifier"):
        classifier = demo.classifier()
    with timed("stages"):
        model = demo.stages()
    janus = Janus.from_pretrained(model, device="cpu")
    with timed("reading"):
        answers = ask(janus, held_out, config.seed)
    with timed("drawing"):
        drawings = {
            name: draw(janus, held_out, settings, config.count, config.seed)
            for name, settings in config.drawings.items()
        }
    sections = _finish(demo, model, held_out, timed, post_training)
    reconstructed, encoding = reconstruct(janus, held_out)
    metrics = {"reading_accuracy": answers.accuracy}
    metrics |= {name: recognised(classifier, images) for name, images in drawings.items()}
    predicted = classifier.classify(held_out.images).numpy()
    metrics["classifier_accuracy"] = float(np.mean(predicted == held_out.labels))
    metrics |= variety(next(iter(drawings.values())), train, held_out)
    metrics |= encoding
    metrics["psnr_db"] = psnr(to_grey(held_out.images), to_grey(reconstructed))
    metrics |= _section_metrics(sections)
    results = Results(
        config, metrics, timed.seconds, answers, drawings, reconstructed, train, held_out, sections
    )
    return metrics, lambda: write_report(demo.output, results)


def _run_names(demo: Demo, timed: StepTimer, post_training: Mapping[str, PostTrainingStep]) -> Evaluated:
    """Train and evaluate a model of images that have a name each; names of ``held_out`` are no other's."""
    config = demo.config
    assert config.trained is not None  # checked by the config
    train, held_out, trained = map(demo.open, (config.images, config.held_out, config.trained))
    with timed("stages"):
        model = demo.stages()
    janus = Janus.from_pretrained(model, device="cpu")
    drawing = next(iter(config.drawings.values()))
    with timed("names"):
        results = {
            split: read_and_draw(janus, source, drawing, config.count, config.seed)
            for split, source in {"trained": trained, "held_out": held_out}.items()
        }
    sections = _finish(demo, model, held_out, timed, post_training)
    reconstructed, encoding = reconstruct(janus, held_out)
    metrics = {
        f"{split}_{name}": value for split in results for name, value in results[split].metrics().items()
    }
    metrics |= encoding
    metrics["psnr_db"] = psnr(to_colours(held_out.images), to_colours(reconstructed))
    metrics |= _section_metrics(sections)
    report = NamesReport(config, metrics, timed.seconds, results, reconstructed, train, held_out, sections)
    return metrics, lambda: write_names_report(demo.output, report)


def _finish(
    demo: Demo,
    model: Path,
    held_out: LabelledImages,
    timed: StepTimer,
    post_training: Mapping[str, PostTrainingStep],
) -> list[ReportSection]:
    """Run the post-training steps."""
    sections = []
    for name, step in post_training.items():
        with timed(name, getdoc(step)):
            sections.append(step(model, demo.output, **_drawing_arguments(held_out, demo.config)))
    return sections


def _section_metrics(sections: Iterable[ReportSection]) -> dict[str, float]:
    return {name: value for section in sections for name, value in section.metrics.items()}


class StepTimer:
    """Prints each step of the demo with its purpose, and records its duration."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, description: str | None = None) -> Iterator[None]:
        """Time one step."""
        self.console.print(f"[bold]{name}[/]: {description or DESCRIPTIONS[name]}")
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began


def _drawing_arguments(held_out: LabelledImages, config: DemoConfig) -> dict[str, Any]:
    """Return prompts of the first names, and the settings of the first drawings, as a step takes them."""
    rng = np.random.default_rng(config.seed)
    settings = next(iter(config.drawings.values()))
    return {
        "prompts": [held_out.prompt(label, rng) for label in range(min(PROMPTS, len(held_out.names)))],
        "settings": {**settings, "seed": config.seed},
    }


def flat_settings(config: DemoConfig) -> dict[str, Any]:
    """Return the settings of a config by dotted keys that begin with ``settings``."""
    settings = flatten(to_plain(config), "settings")
    return {key: value for key, value in settings.items() if value != {}}


def metrics_table(metrics: Mapping[str, float], thresholds: Mapping[str, float]) -> Table:
    """Return the metrics with their thresholds, for the terminal."""
    view = Table("metric", "value", "at least", "", title="Evaluation")
    for name in [*(name for name in METRICS if name in metrics), *sorted(set(metrics) - set(METRICS))]:
        value, least, verdict = metrics[name], "", ""
        if name in thresholds:
            least = f"{thresholds[name]:g}"
            verdict = "[green]yes[/]" if value >= thresholds[name] else "[red]no[/]"
        view.add_row(name, f"{value:.3f}" if name in METRICS else f"{value:.3g}", least, verdict)
    for name in sorted(set(thresholds) - set(metrics)):
        view.add_row(name, "not measured", f"{thresholds[name]:g}", "[red]no[/]")
    return view


@contextmanager
def demo_folder(output: Path) -> Iterator[None]:
    """Lock the folder of a demo against other processes, from the start to the report.

    Raises:
        TrainingError: another process writes the folder, it cannot be written, or a launcher started several
            processes.
    """
    check_single_process()
    check_output(output, "--out FOLDER")
    with run_folder(output):
        yield


def is_finished(output: Path, settings: str, *, result: str) -> bool:
    """Return True if ``output`` holds a demo of these settings that has written its ``result``."""
    mark = output / SETTINGS
    return mark.is_file() and mark.read_text("utf-8") == settings and (output / result).is_file()


def prepare_folder(output: Path, settings: str, *, result: str, force: bool = False) -> bool:
    """Prepare ``output``, which `demo_folder` has locked; return True if it holds an interrupted demo.

    An interrupted demo has the same settings, and no file ``result``. Any other demo is removed with
    ``force`` only.

    Raises:
        TrainingError: ``output`` holds files that are not a demo's, or another demo.
    """
    mark = output / SETTINGS
    if any(path.name != LOCK for path in output.iterdir()) and not mark.is_file():
        raise TrainingError(f"{output} holds something that is not a demo's: choose another --out FOLDER.")
    if mark.is_file() and not force:
        if mark.read_text("utf-8") == settings and not (output / result).exists():
            return True
        state = "is finished" if is_finished(output, settings, result=result) else "has other settings"
        raise TrainingError(
            f"the demo in {output} {state}: choose another --out FOLDER, or use --force, which removes its"
            " model, bundle and report first."
        )
    for name in ("phases", "parts", "model", "bundle"):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / result).unlink(missing_ok=True)
    write_text(mark, settings)
    return False
