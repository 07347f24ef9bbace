"""``plugins new``: a plugin to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
