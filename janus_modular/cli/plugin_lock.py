"""The commands ``plugins lock`` and ``plugins verify``: the bytes of the plugins that a model uses."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A bundle, or a native checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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


def verify(model: Model, as_json: AsJson = False) -> None:
    """Compare the installed plugins with those that `plugins lock` recorded; imports none of them.

    Plugins that only the lock has, or only the environment, are listed.

    Example: janus-modular plugins verify runs/demo/model
    """
    from janus_modular.errors import PluginError
    from janus_modular.plugins import default_plugins
    from janus_modular.plugins.lock import LOCK, check_lock

    if not (model / LOCK).is_file():
        raise PluginError(f"{model} has no {LOCK}: write it with janus-modular plugins lock {model}")
    report = check_lock(model, default_plugins())
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    lines = {
        "as locked": report.checked,
        "locked, not installed, and not needed to run the bundle": report.skipped,
        "locked, though the model uses none of its components": report.unneeded,
        "installed, not locked: the model uses none of its components": report.unlocked,
    }
    for label, names in lines.items():
        if names:
            typer.echo(f"{label}: {', '.join(names)}")
