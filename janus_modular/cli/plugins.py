"""The commands ``plugins``: list, show, check and create components; lock and verify plugins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from janus_modular.cli import plugin_checks
from janus_modular.cli.plugin_checks import unknown_component

if TYPE_CHECKING:
    from janus_modular.plugins import EntryPointInfo, Plugins
    from janus_modular.plugins.probe import Report

app = typer.Typer(help="Components: list, show, check and create them.", no_args_is_help=True)
app.command("check")(plugin_checks.check)
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A bundle, or a native checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_plugins(
    slot: Annotated[
        str | None, typer.Option(help="List only the components of this slot, such as backbones.")
    ] = None,
    as_json: AsJson = False,
    hooks: Annotated[
        bool, typer.Option("--hooks", help="List the hooks that a plugin may implement instead.")
    ] = False,
) -> None:
    """List every component by slot, from metadata alone: nothing is loaded.

    Example: janus-modular plugins list --slot backbones
    """
    from janus_modular.plugins import default_plugins
    from janus_modular.plugins.scaffold import slot_named

    slot = None if slot is None else slot_named(slot)
    if slot and hooks:
        raise typer.BadParameter("--hooks lists the hooks of all slots: leave --slot out")
    if hooks:
        _print_rows(("hook", "what it registers"), _hooks(), as_json)
        return
    plugins = default_plugins()
    rows = [
        {
            "slot": item.slot,
            "name": item.name,
            "plugin": item.origin,
            "where": str(item.file or item.module),
            "state": _state(plugins, item),
        }
        for item in plugins.entry_points
        if slot in (None, item.slot)
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        columns = ("slot", "name", "plugin", "state")
        _print_rows(columns, [tuple(row[column] for column in columns) for row in rows])
        for note in _shared_names([item for item in plugins.entry_points if plugins.is_enabled(item)]):
            typer.echo(f"\n{note}")


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A component: NAME, SLOT:NAME or DISTRIBUTION:NAME.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a component is and which options it takes.

    Example: janus-modular plugins show siglip
    """
    from janus_modular.errors import PluginError
    from janus_modular.plugins.catalogue import without_files
    from janus_modular.plugins.probe import probe, probe_file

    plugins = without_files()
    for path in _files(ctx):
        provided, report = probe_file(path)
        if report.message:
            raise PluginError(report.message)
        plugins.entry_points += provided
    named = [item for item in plugins.entry_points if item.matches(name)]
    matches = [item for item in named if item.name == name or item.dist != name]  # no whole distribution
    if not matches:
        raise unknown_component(plugins, name)
    reports = [(item, probe(item)) for item in matches]
    if as_json:
        typer.echo(json.dumps([_as_dict(item, report) for item, report in reports], indent=2))
    else:
        for item, report in reports:
            _print_report(item, report)
    if broken := [report.message for _, report in reports if report.message]:
        raise PluginError("\n".join(broken))


@app.command()
def doctor(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Only these: NAME, SLOT:NAME, or a distribution. Default: all."),
    ] = None,
    as_json: AsJson = False,
    timeout: Annotated[float, typer.Option(help="Time limit per plugin, in seconds.")] = 300.0,
) -> None:
    """Load plugins in subprocesses, and compare what they declare with what they register.

    Built-in components share a process; every other plugin has one of its own.

    Example: janus-modular plugins doctor
    """
    from rich.console import Console
    from rich.progress import track

    from janus_modular.plugins import EntryPointInfo
    from janus_modular.plugins.catalogue import without_files
    from janus_modular.plugins.probe import probe_all, probe_file

    plugins = without_files()
    broken: list[tuple[EntryPointInfo, Report]] = []  # files whose components are unknown
    for path in _files(ctx):
        provided, report = probe_file(path, timeout=timeout)
        plugins.entry_points += provided
        if report.message:
            broken.append((EntryPointInfo("-", "-", "", path.name, file=path), report))
    checked = [
        item
        for item in plugins.entry_points
        if plugins.is_enabled(item) and (name is None or item.matches(name))
    ]
    if name is not None and not checked:
        raise unknown_component(plugins, name)
    probing = zip(checked, probe_all(checked, known=plugins.entry_points, timeout=timeout), strict=True)
    console = Console(stderr=True)
    reports = list(track(probing, "Loading plugins", len(checked), console=console, transient=True))
    reports += broken
    if as_json:
        typer.echo(json.dumps([_as_dict(item, report) for item, report in reports], indent=2))
    else:
        rows = [
            (item.slot, item.name, item.origin, report.state, f"{report.seconds:.1f} s")
            for item, report in reports
        ]
        _print_rows(("slot", "name", "plugin", "state", "took"), rows)
        for item, report in reports:
            if report.message or report.output:
                typer.echo("\n" + (report.message or f"Plugin '{item.name}' ({item.origin}) works."))
            if report.output:
                typer.echo(f"  its output: {report.output}")
        for note in _shared_names(checked):
            typer.echo(f"\n{note}")
    for word in plugins.disabled:
        if not any(item.matches(word) for item in plugins.entry_points):
            typer.echo(f"JANUS_DISABLE_PLUGINS names '{word}', but nothing has this name.", err=True)
    if any(report.is_broken for _, report in reports):
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Name of the distribution and of its component: acme-dino.")
    ],
    slot: Annotated[
        str, typer.Option(help="Slot of the component: understanding-encoder, adaptor, source, ...")
    ],
    out: Annotated[Path, typer.Option(help="The folder to create the plugin's folder in.")] = Path("."),
) -> None:
    """Write a working plugin: a distribution of one small component, with its test.

    Example: janus-modular plugins new acme-dino --slot understanding-encoder
    """
    from janus_modular.plugins.scaffold import slot_named, write_plugin

    files = write_plugin(name, slot_named(slot), out)
    folder = out / name
    typer.echo(f"{folder}:")
    for file in files:
        typer.echo(f"  {file}")
    typer.echo(f"\nNext:\n  cd {folder}\n  pip install --editable '.[test]'\n  pytest")


@app.command("lock")
def lock(model: Model, as_json: AsJson = False) -> None:
    """Record the files of the plugins that a model uses, beside it: changed ones are refused from then on.

    Example: janus-modular plugins lock runs/demo/model
    """
    from janus_modular.plugins import default_plugins
    from janus_modular.plugins.lock import write_lock

    path = write_lock(model, default_plugins())
    plugins = json.loads(path.read_text("utf-8"))["plugins"]
    if as_json:
        typer.echo(json.dumps({"file": str(path), "plugins": plugins}))
        return
    for plugin in plugins:
        count = len(plugin["files"])
        files = "1 file" if count == 1 else f"{count:,} files"
        typer.echo(f"{plugin['plugin']} {plugin['version']}".strip() + f": {files}")
    typer.echo(f"{path} is written; from now on, the model refuses these plugins if they change")


@app.command("verify")
def verify(model: Model, as_json: AsJson = False) -> None:
    """Compare the installed plugins with those that `plugins lock` recorded; imports none of them.

    Plugins that only the lock has, or only the environment, are listed.

    Example: janus-modular plugins verify runs/demo/model
    """
    from janus_modular.errors import PluginError
    from janus_modular.plugins import default_plugins
    from janus_modular.plugins.lock import LOCK, compare_lock, recorded_plugins, refuse_differences

    if not (model / LOCK).is_file():
        recorded_plugins(model)  # an error for a folder that cannot be locked
        raise PluginError(f"{model} has no {LOCK}: write it with janus-modular plugins lock {model}")
    report = compare_lock(model, plugins := default_plugins())
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    refuse_differences(model, report, plugins)
    if as_json:
        return
    lines = {
        "as locked": report.checked,
        "locked, not installed (or disabled), and not needed to run the bundle": report.skipped,
        "locked, though the model uses none of its components": report.unneeded,
        "installed, not locked: the model uses none of its components": report.unlocked,
    }
    for label, names in lines.items():
        if names:
            typer.echo(f"{label}: {', '.join(names)}")


def _files(ctx: typer.Context) -> list[Path]:
    """Return the plugin files of the environment and the command line, each once."""
    from janus_modular.plugins.catalogue import files_of_environment

    typed = map(Path, ctx.find_root().params.get("plugin") or [])  # typer may pass strings
    return list(dict.fromkeys(path.expanduser().resolve() for path in (*files_of_environment(), *typed)))


def _state(plugins: Plugins, item: EntryPointInfo) -> str:
    return item.incompatibility() or ("on" if plugins.is_enabled(item) else "off")


def _shared_names(checked: Sequence[EntryPointInfo]) -> Iterator[str]:
    """Yield a note for each name that several distributions provide, with the names to write instead."""
    for slot, name in sorted({(item.slot, item.name) for item in checked}):
        sharing = [
            item for item in checked if (item.slot, item.name) == (slot, name) and not item.incompatibility()
        ]
        if len(sharing) > 1:
            words = " or ".join(f"'{item.dist}:{name}'" for item in sharing)
            origins = " and ".join(item.origin for item in sharing)
            yield f"'{name}' in {slot} is provided by {origins}: write {words}."


def _hooks() -> list[tuple[str, str]]:
    from janus_modular.registry import SLOTS, Hooks

    docs = {slot: getattr(Hooks, f"register_{slot}").__doc__ or "" for slot in SLOTS}
    return [(f"register_{slot}(registry)", " ".join(doc.split())) for slot, doc in docs.items()]


def _as_dict(item: EntryPointInfo, report: Report) -> dict[str, object]:
    return {"slot": item.slot, "name": item.name, "plugin": item.origin, **vars(report)}


def _print_rows(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], as_json: bool = False) -> None:
    """Print a table without rich: one line for each row, for grep, and a faster start."""
    if as_json:
        typer.echo(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2))
        return
    lengths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        line = "  ".join(f"{cell:<{length}}" for cell, length in zip(row, lengths, strict=True)).rstrip()
        typer.echo(line)


def _print_report(item: EntryPointInfo, report: Report) -> None:
    from janus_modular.registry import slot_label

    where = report.where or item.file or item.module
    typer.echo(f"{item.name}: {slot_label(item.slot)} of {item.origin} ({where})")
    if report.doc:
        typer.echo(f"\n{report.doc}\n")
    from rich.console import Console
    from rich.table import Table

    table = Table("option", "type", "default", "what it is", box=None, header_style="bold", pad_edge=False)
    for option in report.options:
        table.add_row(option["name"], option["type"], option["default"], option["comment"])
    Console(markup=False, highlight=False).print(table)
    typer.echo()
