"""``export``: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a hub id.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Changes to the config, rows=16 say.")
    ] = None,
    config: Annotated[
        str, typer.Option(help="A YAML file, or a shipped config: export/cpu, export/gpu.")
    ] = "export/portable",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, fp16, bf16, cpu-int8, cpu-int4, trt-int4; repeat it for several."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Write a model as a bundle that ONNX Runtime and TensorRT run; interrupted, it goes on next time."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from janus_modular.config import load, resolve
    from janus_modular.errors import needing

    with needing("'export'", "export"):
        from janus_export.exporting import export as export_model
        from janus_export.settings import ExportConfig

    changes = list(overrides or ())
    if precision:
        changes.append(f"variants=[{', '.join(precision)}]")
    chosen = resolve(load(config, changes), ExportConfig)
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    console = Console(file=sys.stderr)  # this one: while torch traces, another takes what it says
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as progress:
        tasks = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=done, total=total)

        folder = export_model(model, bundle, chosen, tell=tell)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    typer.echo(f"{bundle}: {', '.join(chosen.variants)}; {size / 1e6:,.1f} MB")
