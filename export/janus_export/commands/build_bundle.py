"""``build``: the graphs of a bundle become TensorRT engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `export` wrote.")],
    target: Annotated[str, typer.Option(help="tensorrt (GPUs of data centres) or tensorrt-rtx.")],
    sm: Annotated[
        list[str] | None,
        typer.Option(help="Compute capability, 8.9 say; repeat it. Left out: the GPU that is here."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", "--variant", help="A variant of the bundle, fp16 say. Left out: its first."
        ),
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Positions that a row has room for. Left out: the bundle's typical.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="At most, side by side. Left out: what the bundle was exported for.")
    ] = None,
    graph: Annotated[list[str] | None, typer.Option(help="Build this one only; repeat it.")] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let a runtime keep part of the weights off the GPU.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Read and write what was measured; needs a GPU.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Build an engine of every graph; engines whose graph and settings are as before are kept."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from janus_export.bundle.bundle import load_bundle
    from janus_export.commands.inspect_bundle import describe_build
    from janus_export.tensorrt_build.targets import find_target
    from janus_modular.errors import require_extras

    with require_extras(f"building for {target}", find_target(target).extra):
        from janus_export.tensorrt_build.build import BuildConfig
        from janus_export.tensorrt_build.build import build as build_engines

    config = BuildConfig(
        target,
        precision,
        sm or (),
        capacity,
        rows,
        graph or (),
        weight_streaming,
        timing_cache,
        force,
    )
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as progress:
        task = progress.add_task("engines", total=None)
        key, built = build_engines(
            bundle,
            config,
            tell=lambda name, done, total: progress.update(
                task, description=name, completed=done, total=total
            ),
        )
        progress.update(task, description="engines")
    record = load_bundle(bundle).manifest["built"][key]
    for name, engine in record["engines"].items():
        memory = f", {engine['peak_bytes'] / 1e6:,.0f} MB of memory" if engine["peak_bytes"] else ""
        status = f"built in {engine['seconds']:.1f} s{memory}" if name in built else "kept"
        typer.echo(f"  {name}: {engine['bytes'] / 1e6:,.1f} MB, {status}")
    typer.echo(f"{bundle / 'engines' / key}: {describe_build(record, len(load_bundle(bundle).graphs))}")
