"""``info``: what a model is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from janus_modular.model import JanusModel
    from janus_modular.plugins import Plugins


def info(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder, a YAML file or a shipped model config.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Changes, to a config.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say a model's layout, components, dtypes, parameters and plugins; its weights are not loaded."""
    facts = gather(model, overrides or [])
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(len(row["path"]) for row in facts["components"])
    typer.echo(f"{model}: {facts['layout']}")
    for row in facts["components"]:
        typer.echo(f"  {row['path']:<{width}}  {row['name']:<15} {row['parameters'] / 1e6:>11,.3f} M")
    typer.echo(f"  {'in all':<{width}}  {'':<15} {facts['parameters'] / 1e6:>11,.3f} M")
    for dtype, numbers in facts["dtypes"].items():
        typer.echo(f"stored as {dtype}: {numbers / 1e6:,.3f} M numbers")
    for need in facts["plugins"]:
        typer.echo(f"needs {need}")
    for loaded in facts["pretrained"]:
        typer.echo(loaded)


def gather(model: str, overrides: list[str]) -> dict[str, Any]:
    """Return the facts; only the shapes of a model are built, on the meta device.

    Raises:
        CheckpointError: the folder is no checkpoint, or of no layout that is known here.
        ConfigError: the config cannot be built.
    """
    from janus_modular.checkpoints.native import blank
    from janus_modular.config import load, parts_in, resolve
    from janus_modular.errors import ConfigError
    from janus_modular.plugins import default_plugins
    from janus_modular.schema import ModelConfig

    plugins = default_plugins()
    folder = Path(model).expanduser()
    if folder.is_dir():
        if overrides:
            raise ConfigError(f"{model} is a checkpoint: overrides change configs only.")
        layout, raw, pretrained = _described(folder, plugins)
        dtypes = _dtypes(folder)
    else:
        layout, raw, pretrained, dtypes = "a model config, without weights", load(model, overrides), [], {}
    config = resolve(raw, ModelConfig, plugins)
    built = blank(config, plugins)
    needed = plugins.needed(part for _, part in parts_in(config))
    return {
        "layout": layout,
        "components": _components(built),
        "parameters": sum(one.numel() for one in built.parameters()),
        "dtypes": dtypes,
        "plugins": sorted({one["file"] or f"{one['dist']} {one['version']}" for one in needed}),
        "pretrained": pretrained,
    }


def _described(folder: Path, plugins: Plugins) -> tuple[str, dict[str, Any], list[str]]:
    """Read a checkpoint's description: its layout, its model config, and what its parts came from."""
    from janus_modular.checkpoints.native import MODEL_TYPE, read_record
    from janus_modular.checkpoints.pretrained import PretrainedReport
    from janus_modular.errors import CheckpointError

    record = read_record(folder)
    if record.get("model_type") == MODEL_TYPE:
        plugins.check_needed(record["plugins"])
        reports = [str(PretrainedReport(**report)) for report in record["pretrained"]]
        return f"a checkpoint in the native layout, format {record['format']}", record["model"], reports
    for name in plugins.names("layouts"):
        entry = plugins.entry("layouts", name)
        layout = entry.factory(entry.config())
        if layout.detect(record):
            return f"a checkpoint in the layout '{name}'", layout.read_config(folder), []
    raise CheckpointError(
        f"{folder} is of no known layout: its config.json says model_type {record.get('model_type')!r}.\n"
        f"Known: native, {', '.join(plugins.names('layouts'))}"
    )


def _dtypes(folder: Path) -> dict[str, int]:
    """Count the stored numbers by dtype; files are mapped, not read."""
    from janus_modular.checkpoints.weights import open_weights

    weights = open_weights(folder)
    found: dict[str, int] = {}
    for name in weights:
        tensor = weights[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[dtype] = found.get(dtype, 0) + tensor.numel()
    return found


def _components(model: JanusModel) -> list[dict[str, Any]]:
    """Count each component's parameters, less those of the components inside it."""
    from janus_modular.config import parts_in

    parts = dict(parts_in(model.config))
    counts = {path: sum(one.numel() for one in model.get_submodule(path).parameters()) for path in parts}
    return [
        {
            "path": path,
            "name": part.name,
            "parameters": counts[path]
            - sum(count for inner, count in counts.items() if inner.rpartition(".")[0] == path),
        }
        for path, part in parts.items()
    ]
