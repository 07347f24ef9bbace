"""The commands ``data``: previews and checks of training data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from janus_modular.cli.config import Overrides, TrainingConfig
from janus_modular.cli.options import check_output

if TYPE_CHECKING:
    from rich.console import Console

    from janus_modular.training.data_check import SourceReport

app = typer.Typer(help="Training data: preview and check samples before training.", no_args_is_help=True)


@app.command()
def inspect(
    config: TrainingConfig,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of samples.")] = 8,
    step: Annotated[int, typer.Option(min=0, help="The step whose samples are shown, from 0.")] = 0,
    out: Annotated[str, typer.Option(help="An .html file to write; terminal: print text only.")] = "terminal",
) -> None:
    """Show samples of a training config as the model gets them, their supervised part, and the epochs.

    Example: janus-modular data inspect mine.yaml --out samples.html
    """
    from janus_modular.atomic_writes import write_text
    from janus_modular.config import load, resolve
    from janus_modular.errors import ConfigError
    from janus_modular.plugins import default_plugins
    from janus_modular.training.dry_run import epochs_table
    from janus_modular.training.sample_preview import as_html, as_text, preview_step
    from janus_modular.training.schema import TrainConfig

    if out != "terminal" and Path(out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: expected terminal, or the name of an .html file.")
    if out != "terminal":
        check_output(Path(out))  # before any data is read
    plugins = default_plugins()
    train_config = resolve(load(config, overrides or ()), TrainConfig, plugins)
    preview = preview_step(train_config, plugins, n=n, step=step)
    if out == "terminal":
        from rich.console import Console

        console = Console()
        for sample in preview.samples:
            console.print(as_text(sample))
        console.print(epochs_table(preview.mixture, preview.steps))
        return
    path = Path(out)
    try:
        write_text(path, as_html(preview, title=config))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}. Choose another file.") from error
    typer.echo(path)


@app.command()
def check(
    config: TrainingConfig,
    overrides: Overrides = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of each source, in the order of training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read every sample of a training config once as training does, and count what cannot be used.

    Exit code 1: a sample, or the number of skipped and cut samples, would end the training. The config's
    `workers` and `worker_type` read in parallel.

    Example: janus-modular data check mine.yaml --limit 1000
    """
    from rich.console import Console
    from rich.progress import Progress

    from janus_modular.config import load, resolve
    from janus_modular.plugins import default_plugins
    from janus_modular.training.data_check import check_data
    from janus_modular.training.schema import TrainConfig

    plugins = default_plugins()
    train_config = resolve(load(config, overrides or ()), TrainConfig, plugins)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        reports = check_data(
            train_config,
            plugins,
            limit=limit,
            on_progress=lambda source, done, total: progress.update(
                task, description=source, completed=done, total=total
            ),
        )
    failed = any(report.ends_training for report in reports.values())
    if as_json:
        typer.echo(
            json.dumps({"ok": not failed, "sources": {k: asdict(v) for k, v in reports.items()}}, indent=2)
        )
    else:
        _print_reports(reports, Console())
    if failed:
        raise typer.Exit(1)


@app.command()
def encode(
    config: TrainingConfig,
    overrides: Overrides = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that are encoded at once.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Encode the target images of a training config once, into the folder codes.path.

    Training then reads the codes in place of encoding images in each step. Images that are in the folder
    already are not encoded again, so that the same command continues an interrupted one.

    Example: janus-modular data encode mine.yaml codes.path=codes/mine
    """
    from rich.console import Console
    from rich.progress import Progress

    from janus_modular.config import load, resolve
    from janus_modular.plugins import default_plugins
    from janus_modular.training.encode_images import encode_data
    from janus_modular.training.schema import TrainConfig

    plugins = default_plugins()
    train_config = resolve(load(config, overrides or ()), TrainConfig, plugins)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        report = encode_data(
            train_config,
            plugins,
            batch=batch,
            on_start=lambda samples, size: console.print(
                f"{samples:,} samples; their codes take at most {size / 1e6:,.1f} MB", highlight=False
            ),
            on_progress=lambda source, done, total: progress.update(
                task, description=source, completed=done, total=total
            ),
        )
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    skipped = sum(report.skipped.values())
    typer.echo(
        f"{report.folder}: {report.images:,} images, {report.encoded:,} of them new;"
        f" {report.bytes / 1e6:,.1f} MB{f'; {skipped:,} samples skipped' if skipped else ''}"
    )


def _print_reports(reports: Mapping[str, SourceReport], console: Console) -> None:
    from rich.table import Table

    from janus_modular.foreign import printable

    problems = ("unreadable", "unsupervised", "too_long")
    counts: tuple[str, ...] = (
        "samples",
        "checked",
        *problems,
        "duplicates",
        "longest",
        "positions",
        "supervised",
    )
    if any(report.not_encoded for report in reports.values()):
        counts = (*counts, "not_encoded")
    view = Table("", *reports)
    for column in view.columns[1:]:
        column.justify = "right"
    values: list[dict[str, int]] = [asdict(report) | report.problems for report in reports.values()]
    for name in counts:
        view.add_row(name.replace("_", " "), *(f"{of_source[name]:,}" for of_source in values))
    console.print(view)
    for name, report in reports.items():
        for example in report.examples:
            line = f"{name}, sample {example['index']}: {example['problem'].replace('_', ' ')}:"
            console.out(line, printable(example["reason"], most=2000), highlight=False)
    for name, report in reports.items():
        if report.errors:
            console.out(
                f"{name}: samples that would end the training: {report.errors:,}. Correct them, or let"
                " bad_samples skip, cut or split them.",
                highlight=False,
            )
        elif report.not_encoded:
            console.out(
                f"{name}: target images that codes.path lacks: {report.not_encoded:,}. Add them:"
                " janus-modular data encode CONFIG",
                highlight=False,
            )
        elif not report.supervised:
            console.out(f"{name}: no sample can be used. Correct them.", highlight=False)
        if report.over_limit:
            bad = report.actions["skip"] + report.actions["cut"]
            console.out(
                f"{name}: {bad:,} of {report.checked:,} samples are skipped or cut, more than"
                " bad_samples.limit allows. Correct them, or raise the limit.",
                highlight=False,
            )
