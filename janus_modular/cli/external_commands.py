"""Commands that other packages bring: announced in metadata, loaded when somebody uses them.

    [project.entry-points."janus_modular.commands"]
    export = "janus_export.commands.export_bundle:export"

Each is a function as typer takes it, or a group of them (a ``typer.Typer``), in a module that is quick to
import: ``--help`` loads them all.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer

from janus_modular.errors import PluginError, missing_extra

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
