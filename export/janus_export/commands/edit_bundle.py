"""``bundle``: commands that change an existing bundle. They need neither torch nor ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bundle = typer.Typer(no_args_is_help=True, help="Change an existing bundle.")


@bundle.callback()
def group() -> None:
    """Change an existing bundle."""


@bundle.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `export` wrote.")],
    variants: Annotated[
        list[str] | None, typer.Option(help="Variants to keep, comma-separated. Default: all.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Mode to keep: text, understanding, drawing; may be repeated. Default: all."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A new folder. Default: replace the bundle itself."),
    ] = None,
) -> None:
    """Remove variants or modes from a bundle, with the files that only they use.

    Example: janus-modular bundle prune bundle --only drawing --out small
    """
    from janus_export.bundle.bundle import load_bundle
    from janus_export.bundle.pruning import prune as prune_bundle
    from janus_export.bundle.sizes import variant_size

    def names(options: list[str] | None) -> list[str]:
        return [name.strip() for option in options or () for name in option.split(",")]

    before = load_bundle(folder)
    pruned = load_bundle(prune_bundle(folder, variants=names(variants), only=names(only), target=out))
    typer.echo(f"{out or folder}: {', '.join(pruned.modes)}")
    for variant in pruned.variants:
        typer.echo(f"  {variant}: {variant_size(pruned, variant).total / 1e6:,.1f} MB")
    if before.manifest.get("parity") and pruned.modes != before.modes:
        typer.echo(
            "The results of `verify` were of more modes, and were removed. Verify again:"
            f" janus-modular verify {out or folder} --against CHECKPOINT",
            err=True,
        )
