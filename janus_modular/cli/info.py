"""The command ``info``: the components, parameters and formats of a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from janus_modular.checkpoints.opening import LazyCheckpoint
    from janus_modular.model.model import JanusModel
    from janus_modular.weights.files import Weights

STORED = {
    "parameters": "are the parameters above",
    "buffers": "are buffers (state that is not trained)",
    "tied_copies": "are further copies of tied weights",
    "unused": "are not used by this model",
}
"""What the numbers in weight files can be: keys of ``stored`` in JSON, and their text."""


def info(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A checkpoint's folder, a hub id, a YAML file or a shipped model config."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Overrides of a config.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash a checkpoint's files and compare with its SHA256SUMS.")
    ] = False,
) -> None:
    """Print a model's format, components, dtypes, parameters and plugins; its weights are not loaded.

    Example: janus-modular info runs/demo/model
    """
    facts = gather(model, overrides or [])
    if verify:
        facts["verified"] = verify_files(model, overrides or [])
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    longest = max(len(row["path"]) for row in facts["components"])
    typer.echo(f"{model}: {facts['format']}")
    for row in facts["components"]:
        typer.echo(f"  {row['path']:<{longest}}  {row['name']:<15} {row['parameters'] / 1e6:>11,.3f} M")
    typer.echo(
        f"  {'in all':<{longest}}  {'':<15} {facts['parameters'] / 1e6:>11,.3f} M"
        "  (tied weights counted once)"
    )
    for dtype, numbers in facts["dtypes"].items():
        typer.echo(f"stored as {dtype}: {millions(numbers)} number{'' if numbers == 1 else 's'}")
    if shares := [f"{millions(count)} {STORED[key]}" for key, count in facts["stored"].items() if count]:
        typer.echo(f"of the stored numbers: {', '.join(shares)}")
    for plugin in facts["plugins"]:
        dist = plugin.rpartition(" ")[0]
        installed = [origin.removeprefix(f"{dist} ") for origin in facts["installed"].get(plugin, [])]
        typer.echo(f"needs {plugin}" + (f" (installed: {', '.join(installed)})" if installed else ""))
    for report in facts["pretrained"]:
        typer.echo(report)
    for command, reason in facts["unusable"].items():
        typer.echo(f"{command} cannot be used: {reason}")
    if verify:
        typer.echo(f"verified: {len(facts['verified'])} files are unchanged")


def verify_files(model: str, overrides: list[str]) -> list[str]:
    """Verify a checkpoint's files; return their names.

    Raises:
        CheckpointError: a file was changed, or there is nothing to compare with.
    """
    from janus_modular.errors import CheckpointError
    from janus_modular.weights.checksums import FILE, verify_checksums
    from janus_modular.weights.writing import is_checkpoint_file

    folder = _checkpoint(model, overrides)
    if folder is None:
        raise CheckpointError(f"--verify: {model} is a config, expected a checkpoint: it has no {FILE}.")
    return verify_checksums(folder, is_checkpoint_file=is_checkpoint_file)


def millions(numbers: int) -> str:
    """Return a count in millions, or in full if it is small: ``1,442.941 M``, ``72``."""
    return f"{numbers:,}" if numbers < 1000 else f"{numbers / 1e6:,.3f} M"


def gather(model: str, overrides: list[str]) -> dict[str, Any]:
    """Return the facts; only the shapes of a model are built, on the meta device.

    The errors of a checkpoint that cannot be opened are those of `ModelAssembly.from_checkpoint`.

    Raises:
        CheckpointError: the folder holds no checkpoint of a known format, or its files belong to different
            models.
        ConfigError: the config cannot be built.
    """
    from janus_modular import samplers
    from janus_modular.checkpoints import ModelAssembly, open_lazily
    from janus_modular.checkpoints.native import plugins_of
    from janus_modular.config import load, resolve
    from janus_modular.config.schema import ModelConfig
    from janus_modular.foreign import name_in_errors
    from janus_modular.plugins import default_plugins
    from janus_modular.weights.files import open_weights

    plugins = default_plugins()
    if folder := _checkpoint(model, overrides):
        assembly: ModelAssembly = (checkpoint := open_lazily(folder, plugins=plugins))
        checkpoint.check_weights()
        format_name, dtypes = _format(checkpoint.format_name), _dtypes(open_weights(folder))
        stored = _stored(checkpoint, sum(dtypes.values()))
    else:
        config = resolve(load(model, overrides), ModelConfig, plugins)
        with name_in_errors(model):
            assembly = ModelAssembly.from_config(config, plugins, device="meta")
        format_name, dtypes = "a model config, without weights", {}
        stored = {}
    provenance, installed = assembly.provenance, plugins_of(assembly, plugins)
    recorded = provenance.plugins or installed
    return {
        "format": format_name,
        "components": _components(assembly.model),
        "parameters": sum(parameter.numel() for parameter in assembly.model.parameters()),
        "dtypes": dtypes,
        "stored": stored,
        "plugins": sorted({_origin(item) for item in recorded}),
        "installed": _installed(recorded, installed),
        "pretrained": [str(report) for report in provenance.pretrained],
        "unusable": samplers.unusable_samplers(assembly.model, plugins.as_recorded(provenance.plugins)),
    }


def _origin(record: Mapping[str, str | None]) -> str:
    """Return the distribution and version of a component's plugin, or the name of its file."""
    return record.get("file") or " ".join(filter(None, (record.get("dist"), record.get("version"))))


def _installed(
    recorded: Iterable[Mapping[str, str | None]], installed: Iterable[Mapping[str, str | None]]
) -> dict[str, list[str]]:
    """Return, for each recorded plugin of which another version or plugin is installed, what is installed."""
    origins = {(item["slot"], item["name"]): _origin(item) for item in installed}
    replaced: dict[str, set[str]] = {}
    for item in recorded:
        origin = _origin(item)
        if (present := origins.get((item["slot"], item["name"]), origin)) != origin:
            replaced.setdefault(origin, set()).add(present)
    return {origin: sorted(replaced[origin]) for origin in sorted(replaced)}


def _format(name: str) -> str:
    native, comma, version = name.partition(", ")
    return (
        f"a checkpoint in the {native} format, {version}" if comma else f"a checkpoint in the format '{name}'"
    )


def _checkpoint(model: str, overrides: list[str]) -> Path | None:
    """Return the folder of a checkpoint, fetched if it is a hub id; None where ``model`` names a config.

    ``model/tiny`` has the form of a hub id, too: a name in a folder of the shipped configs is a config.
    """
    from janus_modular.config import shipped
    from janus_modular.errors import CheckpointError, ConfigError
    from janus_modular.foreign import foreign_errors, is_hub_id, printable
    from janus_modular.suggest import did_you_mean
    from janus_modular.weights.pretrained import resolve_pretrained

    with foreign_errors(f"'{printable(model)}'", ConfigError, "Give a folder, a hub id, or a config."):
        path = Path(model).expanduser()
        is_folder = path.is_dir()
    if not is_folder:
        folders = {name.partition("/")[0] for name in shipped()} | {"configs"}
        named = path.is_file() or path.suffix in (".yaml", ".yml") or path.parts[0] in folders
        if not named and not is_hub_id(model) and len(path.parts) > 1:
            near = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = did_you_mean(str(path), near) or "Check the path."
            raise CheckpointError(
                f"there is no file or folder '{printable(model)}'; expected a checkpoint's folder, a hub id,"
                f" a YAML file or a shipped model config. {hint}"
            )
        if named or not is_hub_id(model):
            return None
    if overrides:
        raise ConfigError(f"{model} is a checkpoint: overrides change configs only.")
    return resolve_pretrained(model)


def _dtypes(weights: Weights) -> dict[str, int]:
    """Return the number of stored values by dtype; files are mapped, not read."""
    counts: dict[str, int] = {}
    for name in weights:
        tensor = weights[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        counts[dtype] = counts.get(dtype, 0) + tensor.numel()
    return counts


def _stored(checkpoint: LazyCheckpoint, total: int) -> dict[str, int]:
    """Return how many of the ``total`` numbers in the files are of which purpose, by the keys of `STORED`."""
    state = checkpoint.model.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in checkpoint.model.parameters()}
    counts, counted = dict.fromkeys(STORED, 0), set[int]()
    for name, tensor in checkpoint.tensors.items():
        target = id(state[name])
        purpose = "tied_copies" if target in counted else "parameters" if target in parameters else "buffers"
        counts[purpose] += tensor.numel()
        counted.add(target)
    return counts | {"unused": total - sum(counts.values())}


def _components(model: JanusModel) -> list[dict[str, Any]]:
    """Return the parameters of each component, without those of the components inside it."""
    from janus_modular.config import component_specs, module_path

    specs = dict(component_specs(model.config))
    modules = {path: model.get_submodule(module_path(path)) for path in specs}
    counts = {path: sum(weight.numel() for weight in module.parameters()) for path, module in modules.items()}
    return [
        {
            "path": path,
            "name": spec.name,
            "parameters": counts[path]
            - sum(count for inner, count in counts.items() if inner.rpartition(".")[0] == path),
        }
        for path, spec in specs.items()
    ]
