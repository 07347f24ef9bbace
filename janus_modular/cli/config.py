"""``config``: the shipped configs, and what a config comes to with overrides."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from janus_modular.config.errors import FieldError
    from janus_modular.model.model import JanusModel

app = typer.Typer(help="Configs: list, show, check and compare them.", no_args_is_help=True)
Config = Annotated[str, typer.Argument(help="A YAML file, or a shipped name: tiny, train/janus_pro/stage1.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Changes.")]


@app.command("list")
def list_configs(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the shipped configs with what each is."""
    from janus_modular.config.presets import shipped

    first_lines = {}
    for name, path in shipped().items():
        with path.open(encoding="utf-8") as file:
            first_lines[name] = file.readline().lstrip("# ").strip()
    if as_json:
        typer.echo(json.dumps(first_lines, indent=2))
        return
    width = max(map(len, first_lines), default=0)
    for name, line in first_lines.items():
        typer.echo(f"{name:<{width}}  {line}")


@app.command()
def show(
    config: Config,
    overrides: Overrides = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Check it too, and write out every default.")
    ] = False,
) -> None:
    """Print a config as it is with the overrides applied."""
    from janus_modular.config import load, to_yaml

    raw = load(config, overrides or ())
    typer.echo(to_yaml(_resolved(raw) if defaults else raw), nl=False)


@app.command()
def validate(config: Config, overrides: Overrides = None) -> None:
    """Check a config against what its components take; report every fault at once, with its path.

    A model without pretrained parts is built too, without weights, and reads an image of which only the
    shapes are computed: its parts may not fit each other, or not keep what they promise.
    """
    from janus_modular.config import component_specs, load

    checked = _resolved(load(config, overrides or ()))
    _build(checked)
    typer.echo(f"{config} is valid.")
    for path, part in component_specs(checked):
        typer.echo(f"  {path}: {part.name}")


@app.command()
def diff(
    config: Config,
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[OTHER] [A.B=C]...", help="Another config, or changes.")
    ] = None,
) -> None:
    """Show what overrides change in a config, or how another config differs from it."""
    from janus_modular.config import flatten, load

    other = next((word for word in changes or () if "=" not in word), config)
    before = flatten(load(config))
    after = flatten(load(other, [word for word in changes or () if "=" in word]))
    for path in dict.fromkeys([*before, *after]):
        if path not in after:
            typer.echo(f"- {path}: {json.dumps(before[path], ensure_ascii=False)}")
        elif path not in before:
            typer.echo(f"+ {path}: {json.dumps(after[path], ensure_ascii=False)}")
        elif before[path] != after[path]:
            old, new = (json.dumps(one[path], ensure_ascii=False) for one in (before, after))
            typer.echo(f"  {path}: {old} -> {new}")


def _resolved(raw: dict[str, Any]) -> Any:
    from janus_modular.config import resolve
    from janus_modular.config.config_types import schema_of

    return resolve(raw, schema_of(raw))


def _build(checked: Any) -> None:
    """Build the config's model on the meta device, where nothing has to be fetched for that."""
    from janus_modular.config import component_specs
    from janus_modular.config.errors import config_error
    from janus_modular.config.schema import ModelConfig

    _check_output(checked)
    model = checked if isinstance(checked, ModelConfig) else getattr(checked, "model", None)
    if model is None or any(part.config.pretrained for _, part in component_specs(model)):
        return
    try:
        from janus_modular.model.build import build_model
        from janus_modular.model.checks import shape_errors
        from janus_modular.training.schema import TrainConfig
        from janus_modular.training.train import check_row_length
        from janus_modular.training.trainable import set_trainable
    except ModuleNotFoundError:  # no torch here: components that load without it were checked all the same
        return
    built = build_model(model, on_meta=True)
    if errors := shape_errors(built) or _unusable_samplers(built):
        raise config_error(errors)
    _check_context(built)
    if isinstance(checked, TrainConfig):
        set_trainable(built, checked.learn)
        check_row_length(checked, built)


def _check_context(model: JanusModel) -> None:
    """Hold images, and what frames them in a prompt, to the context.

    A tokenizer that would have to be fetched is not: then at least begin-of-image stands before an image.
    """
    from janus_modular.checkpoints.assembly import build_processor, processor_sizes, tokenizer_files
    from janus_modular.foreign import path_exists
    from janus_modular.processing.processor import check_context_length
    from janus_modular.processing.prompt_check import check_context

    named = model.config.processor.tokenizer
    if named is None or named == "bytes" or path_exists(named):
        with tokenizer_files(model.config) as source:
            check_context(build_processor(model, source))
        return
    sizes = processor_sizes(model)
    read, drawing = sizes["image_tokens"], sizes["drawing"].num_tokens
    for positions, reserved in ((1, drawing), (read + 2, 0)):
        check_context_length(positions, model.backbone.context, reserved=reserved, image_tokens=read)


def _check_output(checked: Any) -> None:
    """Refuse a training whose folder could not be made: that would be known only when it starts."""
    from pathlib import Path

    from janus_modular.training.schema import TrainConfig

    try:
        from janus_modular.training.run_folder import check_output
    except ModuleNotFoundError:  # no torch here
        return
    if isinstance(checked, TrainConfig):
        check_output(Path(checked.output))


def _unusable_samplers(model: JanusModel) -> list[FieldError]:
    """Return an error for each sampler of the model that cannot be used here."""
    from janus_modular import samplers
    from janus_modular.config.errors import FieldError
    from janus_modular.model.build import config_path
    from janus_modular.plugins import default_plugins

    drawing = "image_sampler" if model.config.image_sampler else "generation"
    paths = {"chat": config_path(model.config, "text_sampler"), "draw": config_path(model.config, drawing)}
    refused = samplers.unusable_samplers(model, default_plugins())
    return [FieldError(paths[command], reason, "") for command, reason in refused.items()]
