"""The commands ``config``: list, show, validate and compare configs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from janus_modular.interfaces import ComponentSpec
    from janus_modular.model.model import JanusModel

app = typer.Typer(help="Configs: list, show, check and compare them.", no_args_is_help=True)
Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name: tiny, train/janus_pro/stage1."),
]
TrainingConfig = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped name, such as train/janus_pro/stage1."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Overrides: A.B=C sets the key A.B to C.")
]


@app.command("list")
def list_configs(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the shipped configs with a description of each.

    Example: janus-modular config list
    """
    from janus_modular.config.presets import shipped

    first_lines = {}
    for name, path in shipped().items():
        with path.open(encoding="utf-8") as file:
            first_lines[name] = file.readline().lstrip("# ").strip()
    if as_json:
        typer.echo(json.dumps(first_lines, indent=2))
        return
    longest = max(map(len, first_lines), default=0)
    for name, line in first_lines.items():
        typer.echo(f"{name:<{longest}}  {line}")


@app.command()
def show(
    config: Config,
    overrides: Overrides = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Validate the config, and print every default.")
    ] = False,
) -> None:
    """Print a config with the overrides applied.

    Example: janus-modular config show tiny understanding.adaptor=ldp
    """
    from janus_modular.config import load, to_yaml

    raw = load(config, overrides or ())
    typer.echo(to_yaml(_resolve(raw) if defaults else raw), nl=False)


@app.command()
def validate(config: Config, overrides: Overrides = None) -> None:
    """Check a config against the options of its components; report every error at once, with its path.

    A model is also built, without reading weights, and processes an image of which only shapes are
    computed: this finds components that do not fit each other, break their contract, or differ from the
    folder that they name. For a run that starts from a checkpoint (init) on this disk, the checkpoint's
    model is checked with the run's settings. Nothing is downloaded: names that are not on this disk are
    listed as not compared.

    Example: janus-modular config validate tiny understanding.adaptor=ldp
    """
    from janus_modular.config import load
    from janus_modular.plugins import default_plugins
    from janus_modular.training.chain import load_stages

    if stages := load_stages(config, overrides or (), default_plugins()):
        for name, stage in stages.items():
            _report(f"{config}, {name}", stage)
        return
    _report(config, _resolve(load(config, overrides or ())))


def _report(label: str, resolved: Any) -> None:
    from janus_modular.config import component_specs

    absent = _check_model(resolved)
    typer.echo(f"{label} is valid.")
    for path, spec in component_specs(resolved):
        is_absent = spec in absent
        note = (
            f" (not compared with {spec.config.pretrained}, which is not on this disk)" if is_absent else ""
        )
        typer.echo(f"  {path}: {spec.name}{note}")
    model = getattr(resolved, "model", resolved)
    for key in ("text_sampler", "image_sampler"):
        if name := getattr(model, key, None):
            typer.echo(f"  {'' if model is resolved else 'model.'}{key}: {name}")


@app.command()
def diff(
    config: Config,
    changes: Annotated[
        list[str] | None, typer.Argument(metavar="[OTHER] [A.B=C]...", help="Another config, or overrides.")
    ] = None,
) -> None:
    """Print what overrides change in a config, or how another config differs from it.

    Example: janus-modular config diff tiny understanding.adaptor=ldp
    """
    from janus_modular.config import flatten, load

    compared = next((word for word in changes or () if "=" not in word), config)
    before = flatten(load(config))
    after = flatten(load(compared, [word for word in changes or () if "=" in word]))
    for path in dict.fromkeys([*before, *after]):
        old, new = (json.dumps(values.get(path), ensure_ascii=False) for values in (before, after))
        if path not in after:
            typer.echo(f"- {path}: {old}")
        elif path not in before:
            typer.echo(f"+ {path}: {new}")
        elif before[path] != after[path]:
            typer.echo(f"  {path}: {old} -> {new}")


def _resolve(raw: dict[str, Any]) -> Any:
    from janus_modular.config import resolve
    from janus_modular.config.config_types import schema_of

    return resolve(raw, schema_of(raw))


def _check_model(resolved: Any) -> list[ComponentSpec]:
    """Build and check the config's model on the meta device.

    Returns the components whose ``pretrained`` is not on this disk. If there are any, only the backbone and
    the encoder are built, where they are on it: the others depend on their sizes.
    """
    from janus_modular.config import component_specs
    from janus_modular.config.errors import config_error
    from janus_modular.config.schema import ModelConfig
    from janus_modular.foreign import path_exists

    _check_output(resolved)
    model = resolved if isinstance(resolved, ModelConfig) else getattr(resolved, "model", None)
    start: str | None = getattr(resolved, "init", None)  # of a run that has no model of its own
    if model is None and start is None:
        return []
    try:
        from janus_modular.model.build import ModelBuilder, build_model
        from janus_modular.model.checks import check_shapes
        from janus_modular.plugins import default_plugins
        from janus_modular.training.initial_model import initial_model, sampler_errors
        from janus_modular.training.run_setup import check_training
        from janus_modular.training.schema import TrainConfig
        from janus_modular.weights.loading import parameters_on_meta
    except ModuleNotFoundError:  # without torch, only the options are checked
        return []

    plugins = default_plugins()
    if model is None:
        if start and path_exists(start):  # or else an earlier run makes it, or it is on a hub
            check_training(resolved, initial_model(resolved, plugins, "meta").model, plugins)
        return []

    def absent(config: Any) -> list[ComponentSpec]:
        specs = [spec for _, spec in component_specs(config) if spec.config.pretrained]
        return [spec for spec in specs if not path_exists(spec.config.pretrained)]

    if missing := absent(model):
        with parameters_on_meta():
            for spec in (model.backbone, model.understanding.encoder):
                if not absent(spec):
                    ModelBuilder(plugins, on_meta=True)(spec)
        return missing
    built = build_model(model, on_meta=True)
    if isinstance(resolved, TrainConfig):
        check_training(resolved, built, plugins)
    else:
        check_shapes(built, plugins)
    if errors := sampler_errors(built, plugins):
        raise config_error(errors)
    _check_context(built)
    return []


def _check_context(model: JanusModel) -> None:
    """Check that images and their prompts fit into the context.

    Without a tokenizer that would have to be downloaded, a prompt counts as one position (begin-of-image).
    """
    from janus_modular.checkpoints.assembly import build_processor, processor_sizes, tokenizer_files
    from janus_modular.foreign import path_exists
    from janus_modular.processing.prompt_check import check_context, check_image_fits
    from janus_modular.processing.sequence_builder import check_context_length

    tokenizer = model.config.processor.tokenizer
    if tokenizer is None or tokenizer == "bytes" or path_exists(tokenizer):
        with tokenizer_files(model.config) as source:
            check_context(build_processor(model, source))
        return
    sizes = processor_sizes(model)
    input_tokens = sizes["image_tokens"] * sizes["pixels"].most_images
    target_tokens, context = sizes["drawing"].num_tokens, model.backbone.context
    check_context_length(1, context, reserved=target_tokens, image_tokens=input_tokens)
    check_image_fits(input_tokens, context)


def _check_output(resolved: Any) -> None:
    """Check that the output folder of a training config can be made."""
    from pathlib import Path

    from janus_modular.training.run_folder import check_output
    from janus_modular.training.schema import TrainConfig

    if isinstance(resolved, TrainConfig):
        check_output(Path(resolved.output))
