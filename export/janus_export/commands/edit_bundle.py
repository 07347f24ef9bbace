"""``bundle``: what is done to a bundle that is there already. It needs neither torch nor ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bundle = typer.Typer(no_args_is_help=True, help="Change a bundle that is there already.")


@bundle.callback()
def group() -> None:
    """Change a bundle that is there already."""


@bundle.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `export` wrote.")],
    variants: Annotated[
        list[str] | None, typer.Option(help="To keep, by commas; may be repeated. Left out: all.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A mode to keep: text, understanding, drawing; repeat it. Left out: all."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A new folder; left out, the bundle itself is replaced."),
    ] = None,
) -> None:
    """Take variants or modes out of a bundle, with the files that nothing else needs."""
    from janus_export.bundle.bundle import load_bundle
    from janus_export.bundle.pruning import prune as prune_bundle
    from janus_export.bundle.sizes import variant_size

    def names(options: list[str] | None) -> list[str]:
        return [name.strip() for option in options or () for name in option.split(",")]

    pruned = load_bundle(prune_bundle(folder, variants=names(variants), only=names(only), target=out))
    typer.echo(f"{out or folder}: {', '.join(pruned.modes)}")
    for variant in pruned.variants:
        typer.echo(f"  {variant}: {variant_size(pruned, variant).total / 1e6:,.1f} MB")
