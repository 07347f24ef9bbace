"""``build``: compiles the graphs of a bundle into TensorRT engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `export` wrote.")],
    target: Annotated[str, typer.Option(help="tensorrt (data-centre GPUs) or tensorrt-rtx (RTX GPUs).")],
    sm: Annotated[
        list[str] | None,
        typer.Option(help="Compute capability, such as 8.9; may be repeated. Default: the local GPU."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", "--variant", help="A variant, such as fp16. Default: the bundle's first."
        ),
    ] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Maximum positions per row. Default: the bundle's typical capacity.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="Maximum batch rows. Default: the bundle's maximum.")
    ] = None,
    graph: Annotated[list[str] | None, typer.Option(help="Build only this graph; may be repeated.")] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Let a runtime keep part of the weights off the GPU.")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of timing measurements, read and updated; needs a GPU.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Rebuild existing engines.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Compile every graph into an engine; engines whose graph and settings are unchanged are kept.

    Example: janus-modular build bundle --target tensorrt --precision fp16
    """
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
            on_progress=lambda name, done, total: progress.update(
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
