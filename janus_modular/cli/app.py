"""Joins the commands, takes the global options, and prints what a user can put right."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from janus_modular.cli import chat, config, convert, data, draw, env, info, plugins, train
from janus_modular.errors import JanusError, PluginError, missing_extra
from janus_modular.foreign import printable

TRIED_APART = (["plugins", "doctor"], ["plugins", "show"])
"""Commands that load plugin files in a process of their own: to find what breaks or hangs is their work."""

GLOBAL_FLAGS, GLOBAL_OPTIONS = ("--traceback",), ("--plugin",)


GROUP = "janus_modular.commands"


@cache
def announced() -> dict[str, EntryPoint]:
    """Return the commands that installed packages announce, by name; nothing is imported."""
    return {point.name: point for point in entry_points(group=GROUP)}


def brought_command(name: str) -> Any:
    """Return a brought command as the parser takes it; one that does not load says so when it is run."""
    point = announced()[name]
    app = typer.Typer(add_completion=False)
    try:
        loaded = point.load()
        if isinstance(loaded, typer.Typer):
            group = typer.main.get_command(loaded)
            group.name = name
            return group
        app.command(name)(loaded)
    except Exception as error:
        app.command(name, help=f"(does not load: {error})")(_broken(point, error))
    return typer.main.get_command(app)


def _broken(point: EntryPoint, error: Exception) -> Any:
    def run() -> None:
        cure = missing_extra(error, f"'{point.name}'") if isinstance(error, ModuleNotFoundError) else None
        raise cure or PluginError(
            f"the command '{point.name}' of {point.dist and point.dist.name} ({point.value}) does not load:"
            f" {type(error).__name__}: {error}"
        ) from error

    return run


class JanusGroup(TyperGroup):
    """Takes global options anywhere on the line, and turns our errors into a message and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Bring global options to the front, where the parser expects them."""
        front: list[str] = []
        rest: list[str] = []
        line = iter(args)
        for word in line:
            if word == "--":
                rest += [word, *line]
            elif word in GLOBAL_FLAGS or (word.partition("=")[0] in GLOBAL_OPTIONS and "=" in word):
                front.append(word)
            elif word in GLOBAL_OPTIONS:
                front += [word, *[value for value in [next(line, None)] if value is not None]]
            else:
                rest.append(word)
        ctx.obj = rest[:2]  # the command
        return super().parse_args(ctx, front + rest)

    def list_commands(self, ctx: Any) -> list[str]:
        """Name our commands, and those that other packages bring."""
        ours = super().list_commands(ctx)
        return [*ours, *sorted(set(announced()) - set(ours))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Find a command; one that is brought is loaded now."""
        found = super().get_command(ctx, cmd_name)
        return brought_command(cmd_name) if found is None and cmd_name in announced() else found

    def invoke(self, ctx: Any) -> Any:
        """Run the command; print a `JanusError`, or the pip line that brings a missing package."""
        try:
            return super().invoke(ctx)
        except (JanusError, ModuleNotFoundError) as error:
            cure = missing_extra(error, "this command") if isinstance(error, ModuleNotFoundError) else error
            if cure is None or ctx.params.get("traceback"):
                raise
            said = "\n".join([str(cure), *getattr(cure, "__notes__", ())])
            typer.echo(printable(said, most=20_000), err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="janus-modular",
    cls=JanusGroup,
    help="Train, swap and ship your own Janus: one transformer that reads images and draws them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE.py", help="Load a local plugin file; may be repeated."),
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Take the options that every command has."""
    if version:
        from janus_modular import __version__

        typer.echo(__version__)
        raise typer.Exit
    if plugin and ctx.obj not in TRIED_APART:
        from janus_modular.plugins import default_plugins

        for file in plugin:
            default_plugins().add_file(file)


# One line a command, or a group of them.
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(plugins.app, name="plugins")
app.command()(chat.chat)
app.command()(convert.convert)
app.command()(draw.draw)
app.command()(env.env)
app.command()(info.info)
app.command()(train.train)


def main() -> None:
    """Run the command line; what its terminal cannot show (half a surrogate, say) is printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
