"""The command `janus-modular`: its subcommands, global options, and the printing of errors.

Other packages provide commands by entry points, which are loaded when a user calls them:

    [project.entry-points."janus_modular.commands"]
    export = "janus_export.commands.export_bundle:export"

Each is a function as typer takes it, or a group (a ``typer.Typer``), in a module that is quick to import:
``--help`` loads them all.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from janus_modular.cli import (
    chat,
    config,
    convert,
    data,
    draw,
    env,
    evaluate,
    info,
    plugins,
    runs,
    serve,
    train,
    ui,
)
from janus_modular.errors import JanusError, PluginError, missing_extra
from janus_modular.foreign import printable
from janus_modular.renamed import RENAMED

IN_SUBPROCESS = (["plugins", "doctor"], ["plugins", "show"])
"""Commands that load plugin files in subprocesses, because they diagnose files that fail or hang."""

GLOBAL_FLAGS, GLOBAL_OPTIONS = ("--traceback",), ("--plugin",)


GROUP = "janus_modular.commands"


@cache
def external_commands() -> dict[str, EntryPoint]:
    """Return the entry points of the commands that installed packages provide, by name; imports nothing."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_external_command(name: str) -> Any:
    """Return the command of another package; where it does not load, a command that raises the error."""
    point = external_commands()[name]
    app = typer.Typer(add_completion=False)
    try:
        loaded = point.load()
        if isinstance(loaded, typer.Typer):
            group = typer.main.get_command(loaded)
            group.name = name
            return group
        app.command(name)(loaded)
    except Exception as error:
        app.command(name, help=f"(does not load: {error})")(_failing_command(point, error))
    return typer.main.get_command(app)


def _failing_command(point: EntryPoint, error: Exception) -> Any:
    def run() -> None:
        extra = missing_extra(error, f"'{point.name}'") if isinstance(error, ModuleNotFoundError) else None
        raise extra or PluginError(
            f"the command '{point.name}' of {point.dist and point.dist.name} ({point.value}) does not load:"
            f" {type(error).__name__}: {error}"
        ) from error

    return run


def without_flag_types(command: Any, ctx: Any) -> Any:
    """Return a command whose help shows its flags without ``<bool>``; for a group, in its commands too."""
    for parameter in command.params if ctx is None else command.get_params(ctx):
        without_type(parameter)
    for inner in getattr(command, "commands", {}).values():
        without_flag_types(inner, ctx)
    return command


def without_type(parameter: Any) -> Any:
    """Return a parameter whose help shows no type if it is a flag."""
    if getattr(parameter, "is_flag", False):
        parameter.display_type_rich = lambda ctx: None
    return parameter


class JanusGroup(TyperGroup):
    """Accepts global options anywhere on the line, and prints a `JanusError` with exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move global options to the front, where the parser expects them.

        Raises:
            typer.BadParameter: an option has its name of the previous version; says the new one.
        """
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
            elif rest[:1] == ["convert"] and word.partition("=")[0] == "--layout":
                raise typer.BadParameter(f"--layout is called {' or '.join(RENAMED['--layout'])} now.")
            else:
                rest.append(word)
        ctx.obj = rest[:2]  # the command
        return super().parse_args(ctx, front + rest)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of our commands and of the commands of other packages."""
        names = super().list_commands(ctx)
        return [*names, *sorted(set(external_commands()) - set(names))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; a command of another package is loaded now."""
        command = super().get_command(ctx, cmd_name)
        is_external = command is None and cmd_name in external_commands()
        command = load_external_command(cmd_name) if is_external else command
        return command and without_flag_types(command, ctx)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the global options."""
        return [without_type(parameter) for parameter in super().get_params(ctx)]

    def invoke(self, ctx: Any) -> Any:
        """Run the command; print a `JanusError`, or how to install a missing package."""
        try:
            return super().invoke(ctx)
        except (JanusError, ModuleNotFoundError) as error:
            user_error: JanusError | None = (
                error if isinstance(error, JanusError) else missing_extra(error, "this command")
            )
            if user_error is None or ctx.params.get("traceback"):
                raise
            message = "\n".join([str(user_error), *getattr(user_error, "__notes__", ())])
            typer.echo(printable(message, most=20_000), err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="janus-modular",
    cls=JanusGroup,
    help="Train, extend and deploy Janus-like models: one transformer that understands and generates images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    plugin: Annotated[
        list[Path] | None,
        typer.Option("--plugin", metavar="FILE.py", help="Load a local plugin file; may be repeated."),
    ] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Handle the global options."""
    if version:
        from janus_modular import __version__

        typer.echo(__version__)
        raise typer.Exit
    if plugin and ctx.obj not in IN_SUBPROCESS:
        from janus_modular.plugins import default_plugins

        for file in plugin:
            default_plugins().add_file(file)


# A line for each command or group.
app.add_typer(config.app, name="config")
app.add_typer(data.app, name="data")
app.add_typer(plugins.app, name="plugins")
app.add_typer(runs.app, name="runs")
app.command()(chat.chat)
app.command()(convert.convert)
app.command()(draw.draw)
app.command()(env.env)
app.command("eval")(evaluate.evaluate)
app.command()(info.info)
app.command()(serve.serve)
app.command()(train.train)
app.command()(ui.ui)


def main() -> None:
    """Run the command line; characters that the terminal cannot show are printed escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
