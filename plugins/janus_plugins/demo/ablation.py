"""An ablation of the papers' thesis: understanding and generation need separate visual encoders.

Two models differ in one component. The decoupled model reads through the encoder of the config; the shared
model reads through the codebook embeddings of its image tokenizer, so that one VQ encoder serves both. For
each seed they share the image tokenizer, the classifier, the data and every stage (Janus, section 4.4 and
table 5).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from janus_modular.atomic_writes import write_text
from janus_modular.config import load, resolve, to_plain
from janus_modular.errors import ConfigError
from janus_modular.janus import Janus
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.weights.files import open_weights
from janus_plugins.demo.evaluation import ask, draw, recognised
from janus_plugins.demo.phases import Demo, write_component
from janus_plugins.demo.run import demo_folder, prepare_folder
from janus_plugins.demo.schema import DemoConfig

TOKENIZER = "generation.tokenizer"
"""The path of the image tokenizer in the model."""

SHARED = "tokenizer-features"
"""The understanding encoder whose features are the codebook embeddings of an image tokenizer."""


def run_ablation(
    raw: Mapping[str, Any],
    output: Path,
    *,
    seeds: int = 3,
    quiet: bool = False,
    plugins: Plugins | None = None,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Train and evaluate both models for each seed; return, print and write a row for each seed.

    An interrupted ablation of the same settings in ``output`` is continued: its finished phases are kept.

    Raises:
        TrainingError: ``output`` holds files that are not a demo's, another process writes it, or a launcher
            started several processes.
        ConfigError: the generation path has no image tokenizer, which the models share.
    """
    plugins = plugins or default_plugins()
    shared_config(raw, plugins)  # checked before anything is trained
    with demo_folder(output):
        return _run(raw, output, seeds, quiet, plugins, force)


def _run(
    raw: Mapping[str, Any], output: Path, seeds: int, quiet: bool, plugins: Plugins, force: bool
) -> list[dict[str, Any]]:
    """Run an ablation in its folder, which this process has locked."""
    settings = json.dumps({"seeds": seeds, "config": dict(raw)}, indent=2)
    if not prepare_folder(output, settings, result="ablation.json", force=force):
        for folder in output.glob("seed*"):
            shutil.rmtree(folder)
    rows = [
        _run_seed(load(raw, [f"seed={seed}"]), output / f"seed{seed}", quiet, plugins)
        for seed in range(seeds)
    ]
    write_text(output / "ablation.json", json.dumps(rows, indent=2) + "\n")
    Console().print(ablation_table(rows))
    return rows


def _run_seed(raw: dict[str, Any], output: Path, quiet: bool, plugins: Plugins) -> dict[str, Any]:
    """Return the metrics of both models."""
    config = resolve(raw, DemoConfig, plugins)
    decoupled = Demo(config, output / "decoupled", plugins, quiet)
    classifier = decoupled.classifier()
    tokenizer = _tokenizer_of(decoupled.stages(), output / "parts" / "tokenizer")
    trained = dict.fromkeys((TOKENIZER, "understanding.encoder.tokenizer"), tokenizer)
    shared = Demo(shared_config(raw, plugins), output / "shared", plugins, quiet, trained)
    row: dict[str, Any] = {"seed": config.seed}
    name, settings = next(iter(config.drawings.items()))
    for arm, demo in (("decoupled", decoupled), ("shared", shared)):
        held_out = demo.open(config.held_out)
        janus = Janus.from_pretrained(demo.stages(), device="cpu", plugins=plugins)
        row[f"{arm}_reading_accuracy"] = round(ask(janus, held_out, config.seed).accuracy, 4)
        drawings = draw(janus, held_out, settings, config.count, config.seed)
        row[f"{arm}_{name}"] = round(recognised(classifier, drawings), 4)
    row["reading_gain"] = round(row["decoupled_reading_accuracy"] - row["shared_reading_accuracy"], 4)
    return row


def _tokenizer_of(model: Path, folder: Path) -> Path:
    """Write the weights of a model's image tokenizer, by its own names, into a folder; return the folder."""
    weights, prefix = open_weights(model), f"{TOKENIZER}."
    own = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    return write_component(folder, own)


def shared_config(raw: Mapping[str, Any], plugins: Plugins) -> DemoConfig:
    """Return the config with one VQ encoder for both paths, which no stage trains.

    The stages that train a component alone are left out: the tokenizer is that of the other model.

    Raises:
        ConfigError: the generation path has no image tokenizer.
    """
    config = resolve(raw, DemoConfig, plugins)
    plain = to_plain(config)
    path = plain["model"]["generation"]
    if "tokenizer" not in path:
        raise ConfigError(
            f"model.generation: '{path['name']}' has no image tokenizer, which an encoder could share;"
            " expected a generation path that draws codes, such as autoregressive."
        )
    plain["model"]["understanding"]["encoder"] = {
        "name": SHARED,
        "tokenizer": path["tokenizer"],
        "height": path["height"],
        "width": path["width"],
    }
    plain["stages"] = {name: stage for name, stage in plain["stages"].items() if not stage.get("objective")}
    return resolve(plain, DemoConfig, plugins)


def ablation_table(rows: list[dict[str, Any]]) -> Table:
    """Return the rows and their means, for the terminal."""
    view = Table(*(name.replace("_", " ") for name in rows[0]), title="Decoupled against shared")
    for row in rows:
        view.add_row(*(str(value) for value in row.values()))
    means = [f"{np.mean([row[name] for row in rows]):.4f}" for name in rows[0] if name != "seed"]
    view.add_section()
    view.add_row("mean", *means)
    return view
