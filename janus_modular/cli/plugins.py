"""``plugins``: what is installed, what a component takes, whether each one loads and keeps its promises."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from janus_modular.cli import plugin_checks

if TYPE_CHECKING:
    from janus_modular.plugins import EntryPointInfo, Plugins
    from janus_modular.plugins.probe import Report

app = typer.Typer(help="Components: list them, look at one, check them all.", no_args_is_help=True)
app.command("check")(plugin_checks.check)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_plugins(
    as_json: AsJson = False,
    hooks: Annotated[
        bool, typer.Option("--hooks", help="List the hooks that a plugin may implement instead.")
    ] = False,
) -> None:
    """List every component by slot, from metadata alone: nothing is loaded."""
    from janus_modular.plugins import default_plugins

    if hooks:
        _print_rows(("hook", "what it offers"), _hooks(), as_json)
        return
    plugins = default_plugins()
    rows = [
        {
            "slot": one.slot,
            "name": one.name,
            "plugin": one.origin,
            "where": str(one.file or one.module),
            "state": _state(plugins, one),
        }
        for one in plugins.entry_points
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        columns = ("slot", "name", "plugin", "state")
        _print_rows(columns, [tuple(row[column] for column in columns) for row in rows])
        for note in _shared([one for one in plugins.entry_points if plugins.is_enabled(one)]):
            typer.echo(f"\n{note}")


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A component: NAME, SLOT:NAME or DISTRIBUTION:NAME.")],
    as_json: AsJson = False,
) -> None:
    """Show what a component is and which options it takes."""
    from janus_modular.errors import PluginError
    from janus_modular.plugins.catalogue import without_files
    from janus_modular.plugins.probe import probe, probe_file
    from janus_modular.suggest import did_you_mean

    plugins = without_files()
    for path in _files(ctx):
        offers, tried = probe_file(path)
        if tried.message:
            raise PluginError(tried.message)
        plugins.entry_points += offers
    found = [one for one in plugins.entry_points if one.matches(name) and one.dist != name]
    if not found:
        known = [word for one in plugins.entry_points for word in (one.name, f"{one.slot}:{one.name}")]
        raise PluginError(
            f"no component is called '{name}'. {did_you_mean(name, known)}".rstrip()
            + "\nSee them all with: janus-modular plugins list"
        )
    reports = [(one, probe(one)) for one in found]
    if as_json:
        typer.echo(json.dumps([_as_dict(one, report) for one, report in reports], indent=2))
    else:
        for one, report in reports:
            _print_report(one, report)
    if broken := [report.message for _, report in reports if report.message]:
        raise PluginError("\n".join(broken))


@app.command()
def doctor(
    ctx: typer.Context,
    as_json: AsJson = False,
    timeout: Annotated[float, typer.Option(help="Seconds that each plugin may take.")] = 300.0,
) -> None:
    """Load every plugin in a process of its own, and compare what it announces with what it registers."""
    from rich.console import Console
    from rich.progress import track

    from janus_modular.plugins import EntryPointInfo
    from janus_modular.plugins.catalogue import without_files
    from janus_modular.plugins.probe import probe_all, probe_file

    plugins = without_files()
    broken: list[tuple[EntryPointInfo, Report]] = []  # files of which nobody can say what they offer
    for path in _files(ctx):
        offers, tried = probe_file(path, timeout=timeout)
        plugins.entry_points += offers
        if tried.message:
            broken.append((EntryPointInfo("-", "-", "", path.name, file=path), tried))
    checked = [one for one in plugins.entry_points if plugins.is_enabled(one)]
    probing = zip(checked, probe_all(checked, known=plugins.entry_points, timeout=timeout), strict=True)
    quietly = Console(stderr=True)
    reports = list(track(probing, "Loading plugins", len(checked), console=quietly, transient=True))
    reports += broken
    if as_json:
        typer.echo(json.dumps([_as_dict(one, report) for one, report in reports], indent=2))
    else:
        rows = [
            (one.slot, one.name, one.origin, report.state, f"{report.seconds:.1f} s")
            for one, report in reports
        ]
        _print_rows(("slot", "name", "plugin", "state", "took"), rows)
        for one, report in reports:
            if report.message or report.output:
                typer.echo("\n" + (report.message or f"Plugin '{one.name}' ({one.origin}) works."))
            if report.output:
                typer.echo(f"  it printed: {report.output}")
        for note in _shared(checked):
            typer.echo(f"\n{note}")
    for word in plugins.disabled:
        if not any(one.matches(word) for one in plugins.entry_points):
            typer.echo(f"JANUS_DISABLE_PLUGINS names '{word}', but nothing here is called so.", err=True)
    if any(report.is_broken for _, report in reports):
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the distribution and of its component: acme-dino.")],
    slot: Annotated[str, typer.Option(help="What it is: understanding-encoder, adaptor, source, ...")],
    out: Annotated[Path, typer.Option(help="The folder that the plugin's own is made in.")] = Path("."),
) -> None:
    """Write a plugin that works: a distribution of one small component, with its test."""
    from janus_modular.plugins.scaffold import slot_named, write_plugin

    files = write_plugin(name, slot_named(slot), out)
    folder = out / name
    typer.echo(f"{folder}:")
    for file in files:
        typer.echo(f"  {file}")
    typer.echo(f"\nNext:\n  cd {folder}\n  pip install --editable '.[test]'\n  pytest")


def _files(ctx: typer.Context) -> list[Path]:
    """Return the plugin files that the environment and the command line name, each once."""
    from janus_modular.plugins.catalogue import files_of_environment

    typed = map(Path, ctx.find_root().params.get("plugin") or [])  # typer may keep what was typed
    return list(dict.fromkeys(path.expanduser().resolve() for path in (*files_of_environment(), *typed)))


def _state(plugins: Plugins, one: EntryPointInfo) -> str:
    return one.incompatibility() or ("on" if plugins.is_enabled(one) else "off")


def _shared(checked: Sequence[EntryPointInfo]) -> Iterator[str]:
    """Say which names several distributions share, and what to write instead: no fault of one plugin."""
    for slot, name in sorted({(one.slot, one.name) for one in checked}):
        sharing = [
            one for one in checked if (one.slot, one.name) == (slot, name) and not one.incompatibility()
        ]
        if len(sharing) > 1:
            words = " or ".join(f"'{one.dist}:{name}'" for one in sharing)
            origins = " and ".join(one.origin for one in sharing)
            yield f"'{name}' in {slot} is offered by {origins}: write {words}."


def _hooks() -> list[tuple[str, str]]:
    from janus_modular.registry import SLOTS, Hooks

    docs = {slot: getattr(Hooks, f"register_{slot}").__doc__ or "" for slot in SLOTS}
    return [(f"register_{slot}(registry)", " ".join(doc.split())) for slot, doc in docs.items()]


def _as_dict(one: EntryPointInfo, report: Report) -> dict[str, object]:
    return {"slot": one.slot, "name": one.name, "plugin": one.origin, **vars(report)}


def _print_rows(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], as_json: bool = False) -> None:
    """Print a table without rich: a line a row however long, for grep, and a third of the start-up time."""
    if as_json:
        typer.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        typer.echo(line)


def _print_report(one: EntryPointInfo, report: Report) -> None:
    from janus_modular.registry import slot_label

    where = report.where or one.file or one.module
    typer.echo(f"{one.name}: {slot_label(one.slot)} of {one.origin} ({where})")
    if report.doc:
        typer.echo(f"\n{report.doc}\n")
    from rich.console import Console
    from rich.table import Table

    table = Table("option", "type", "default", "what it is", box=None, header_style="bold", pad_edge=False)
    for option in report.options:
        table.add_row(option["name"], option["type"], option["default"], option["comment"])
    Console(markup=False, highlight=False).print(table)
    typer.echo()
