"""The commands ``runs``: training runs from their folders, without torch. Nothing is written into a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from janus_modular.cli.options import check_output

if TYPE_CHECKING:
    from janus_modular.training.run_record import Run

app = typer.Typer(
    help="Training runs: list, inspect, compare and plot them, also during training.", no_args_is_help=True
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a training run.")]
RunArguments = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Output folders of training runs.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Runs in this folder and below are listed.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List training runs with state, finished steps, last losses and the time of the last change.

    A run with a damaged file is listed as damaged, with the error on stderr, and the exit code is 1.

    Example: janus-modular runs list runs
    """
    from janus_modular.errors import TrainingError
    from janus_modular.training.run_record import find_runs
    from janus_modular.training.run_summaries import summary

    runs: list[dict[str, Any]] = []
    for run in find_runs(folder):
        try:
            runs.append(summary(run))
        except TrainingError as error:
            runs.append({"run": str(run.folder), "state": "damaged", "error": str(error)})
    if as_json:
        typer.echo(json.dumps(runs, indent=2))
    elif not runs:
        typer.echo(f"{folder} has no runs: no folder with checkpoints or metrics.")
    else:
        columns = ("run", "state", "steps", "loss", "validation", "changed", "model")
        typer.echo(aligned([columns, *map(_row, runs)]))
    damages = [run["error"] for run in runs if "error" in run]
    for damage in damages:
        typer.echo(damage, err=True)
    if damages:
        raise typer.Exit(1)


def _row(run: dict[str, Any]) -> list[str]:
    if "error" in run:
        return [run["run"], run["state"], *["-"] * 5]
    loss = "-" if run["loss"] is None else f"{run['loss']:.4f}"
    validation = ", ".join(f"{name} {value:.4f}" for name, value in run["validation"].items())
    return [
        run["run"],
        run["state"],
        _steps(run),
        loss,
        validation or "-",
        run["changed"],
        run["model"] or "-",
    ]


def _steps(run: dict[str, Any]) -> str:
    return f"{run['done']:,} of {'?' if run['steps'] is None else format(run['steps'], ',')}"


@app.command()
def show(run: RunArgument, as_json: AsJson = False) -> None:
    """Print a run's settings, plugins, checkpoints, last metrics and validation results.

    Settings and plugins are those of the newest checkpoint.

    Example: janus-modular runs show runs/train
    """
    from janus_modular.config import flatten
    from janus_modular.training.run_record import open_run
    from janus_modular.training.run_summaries import details

    facts = details(open_run(run))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{facts['run']}: {facts['state']}, {_steps(facts)} steps, last changed {facts['changed']}")
    if not facts["settings"]:
        typer.echo("settings and plugins are unknown before the first checkpoint")
    _section("settings", [[name, _value(value)] for name, value in flatten(facts["settings"]).items()])
    plugins = [
        [f"{plugin.get('slot')}: {plugin.get('name')}", plugin.get("file") or _version(plugin)]
        for plugin in facts["plugins"]
    ]
    _section(f"plugins, as recorded by janus-modular {facts['written_by']}", plugins)
    _section("checkpoints", [[name] for name in facts["checkpoints"]])
    metrics = dict(facts["metrics"])
    _section(f"metrics of step {metrics.pop('step', '-')}", [[k, f"{v:.6g}"] for k, v in metrics.items()])
    for validation in facts["validations"]:
        rows = [[name, f"{value:.4f}"] for name, value in validation["losses"].items()]
        rows += [[answer["question"], answer["answer"]] for answer in validation["answers"]]
        rows += [["drawing", path] for path in validation["drawings"]]
        _section(f"validation after step {validation['step']:,}", rows)


def _version(plugin: dict[str, Any]) -> str:
    return f"{plugin.get('dist')} {plugin.get('version')}"


def _section(title: str, rows: Sequence[Sequence[str]]) -> None:
    if rows:
        typer.echo(f"\n{title}\n{aligned([['', *row] for row in rows])}")


@app.command()
def compare(
    runs: RunArguments,
    metric: Annotated[
        list[str] | None, typer.Option(help="A metric to compare; may be repeated. Default: all losses.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Largest number of steps printed of each metric.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with all steps.")] = False,
) -> None:
    """Print the settings in which runs differ, and their metrics at the same steps side by side.

    Example: janus-modular runs compare runs/first runs/second --metric loss
    """
    from janus_modular.training.run_summaries import common_metrics, differing_settings

    opened = _open(runs)
    if len(opened) < 2:
        raise typer.BadParameter("found a single RUN; expected at least two.")
    names = [str(run.folder) for run in opened]
    settings, metrics = differing_settings(opened), common_metrics(opened, metric or ())
    unrecorded = [str(run.folder) for run in opened if not run.config]
    if as_json:
        facts = {"runs": names, "without_settings": unrecorded, "settings": settings, "metrics": metrics}
        typer.echo(json.dumps(facts, indent=2))
        return
    for name in unrecorded:
        typer.echo(f"{name}: settings are unknown before the first checkpoint, and not compared", err=True)
    if settings:
        table = [
            [key, *(_value(values[name]) if name in values else "-" for name in names)]
            for key, values in settings.items()
        ]
        typer.echo(aligned([["setting", *names], *table]))
    else:
        typer.echo("no setting differs")
    for name, steps in metrics.items():
        if not steps:
            typer.echo(f"\n{name}: no step has a value in all of the runs")
            continue
        chosen = _evenly(list(steps), rows)
        table = [[f"{step:,}", *(f"{steps[step][run]:.6g}" for run in names)] for step in chosen]
        note = "" if len(chosen) == len(steps) else f" ({len(chosen)} of {len(steps):,} steps; all: --json)"
        typer.echo(f"\n{name}{note}\n{aligned([['step', *names], *table])}")


def _evenly(steps: list[int], most: int) -> list[int]:
    """Return up to ``most`` steps, evenly spaced, the last among them."""
    count = min(most, len(steps))
    return [steps[-1 - (count - 1 - i) * (len(steps) - 1) // max(count - 1, 1)] for i in range(count)]


@app.command()
def plot(
    runs: RunArguments,
    output: Annotated[Path, typer.Option("-o", "--output", help="The .html or .png file to write.")],
) -> None:
    """Plot losses, validation losses and learning rates over the steps.

    An .html file also has the drawings and answers of validation, and needs no other file. A .png file needs
    matplotlib (extra plot).

    Example: janus-modular runs plot runs/first runs/second -o runs.html
    """
    from janus_modular.atomic_writes import atomic_replace, write_text
    from janus_modular.errors import TrainingError
    from janus_modular.foreign import printable, reason
    from janus_modular.training.run_charts import page, write_png

    if output.suffix not in (".html", ".htm", ".png"):
        raise typer.BadParameter(f"-o '{printable(output)}': expected the name of an .html or a .png file.")
    check_output(output)
    opened = _open(runs)
    title = ", ".join(str(run.folder) for run in opened)
    try:
        if output.suffix == ".png":
            with atomic_replace(output) as temporary:
                write_png(opened, temporary, title=title)
        else:
            write_text(output, page(opened, title=title))
    except OSError as error:
        raise TrainingError(f"{output} cannot be written: {reason(error)}. Choose another file.") from error
    typer.echo(output)


def _open(folders: Sequence[Path]) -> list[Run]:
    from janus_modular.training.run_record import open_run

    runs = [open_run(folder) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise typer.BadParameter("a RUN is given twice; expected different folders.")
    return runs


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table with aligned columns; characters that would break a line are escaped."""
    from janus_modular.foreign import printable

    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(lines)
