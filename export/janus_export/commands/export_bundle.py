"""``export``: exports a checkpoint as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a hub id.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A.B=C]...", help="Overrides of the config, for example rows=16."),
    ] = None,
    config: Annotated[
        str, typer.Option(help="A YAML file, or a shipped config: export/cpu, export/gpu.")
    ] = "export/portable",
    precision: Annotated[
        list[str] | None,
        typer.Option(help="fp32, fp16, bf16, cpu-int8, cpu-int4, trt-int4; may be repeated."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Mode: text, understanding, drawing; may be repeated. Default: all."),
    ] = None,
    max_file_size: Annotated[
        str | None, typer.Option(help="Maximum size of a weight file, for example 2GB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the sizes as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Export a model as a bundle for ONNX Runtime and TensorRT, or continue an interrupted export.

    Example: janus-modular export runs/demo/model bundle --precision cpu-int8
    """
    import json
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from janus_modular.config import load, resolve
    from janus_modular.errors import ConfigError, require_extras
    from janus_modular.foreign import printable

    with require_extras("'export'", "export"):
        from janus_export.bundle.bundle import load_bundle
        from janus_export.bundle.sizes import checkpoint_bytes, variant_size
        from janus_export.config import ExportConfig
        from janus_export.onnx_export.export import export as export_model

    changes = list(overrides or ())
    overridden = {text.partition("=")[0].strip().partition(".")[0]: text for text in changes}
    for key, option, value in (
        ("variants", "--precision", f"[{', '.join(precision)}]" if precision else None),
        ("only", "--only", f"[{', '.join(only)}]" if only else None),
        ("max_file_size", "--max-file-size", None if max_file_size is None else f"'{max_file_size}'"),
    ):
        if value is not None and key in overridden:
            raise ConfigError(
                f"found both {option} and {printable(overridden[key], 80)}; expected one of them: both"
                f" set {key}. Leave one out."
            )
        if value is not None:
            changes.append(f"{key}={value}")
    chosen = resolve(load(config, changes), ExportConfig)
    columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    console = Console(file=sys.stderr)  # explicit: during tracing, stderr is redirected
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=quiet) as progress:
        tasks = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage)
            progress.update(tasks[stage], completed=done, total=total)

        folder = export_model(model, bundle, chosen, on_progress=on_progress)
    opened = load_bundle(folder)
    sizes, checkpoint = (
        [variant_size(opened, name) for name in opened.variants],
        checkpoint_bytes(opened.manifest),
    )
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if as_json:
        facts = {
            "checkpoint_bytes": checkpoint,
            "bytes": on_disk,
            "variants": [item.to_dict() for item in sizes],
        }
        typer.echo(json.dumps({"bundle": str(bundle), **facts}, indent=2))
        return
    beside = f", the checkpoint {checkpoint / 1e6:,.1f} MB" if checkpoint else ""
    typer.echo(f"{bundle}: {', '.join(opened.modes)}; {on_disk / 1e6:,.1f} MB in total{beside}")
    for item in sizes:
        graphs = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in item.graphs.items())
        typer.echo(f"  {item.variant}: {item.total / 1e6:,.1f} MB ({graphs})")
