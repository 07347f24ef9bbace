"""The command ``serve``: a model over OpenAI's HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from janus_modular.cli.config import Overrides
from janus_modular.cli.options import (
    AllowFailed,
    Device,
    Dtype,
    ModelArgument,
    Runtime,
    Variant,
    use_passive_waiting,
)


def serve(
    model: ModelArgument,
    overrides: Overrides = None,
    config: Annotated[
        str, typer.Option(metavar="CONFIG", help="A YAML file, or a shipped name.")
    ] = "serve/local",
    host: Annotated[
        str | None, typer.Option(help="Address to listen at; default 127.0.0.1, this machine alone.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default 8000; 0: any free port.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; default: the variable JANUS_API_KEYS.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve replicas in a Ray cluster, with the settings ray.*.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    threads: Annotated[
        int | None,
        typer.Option(min=0, help="For a bundle in ONNX Runtime: CPU threads; default 0: one per core."),
    ] = None,
    allow_failed: AllowFailed = False,
) -> None:
    """Serve a model or a bundle: chat and drawing in one batch, over OpenAI's HTTP API.

    Example: janus-modular serve runs/demo/model --port 8000 rows=16 limits.images=2
    """
    from janus_modular.bundles import extras_to_open
    from janus_modular.errors import require_extras

    def print_address(address: str) -> None:
        typer.echo(f"{settings.name or Path(model).name or model}: {address}/v1 (Ctrl-C stops)", err=True)

    use_passive_waiting()
    extras, modules = extras_to_open(model, runtime)
    with require_extras("'serve'", "serve", *extras, modules=modules):
        from janus_modular.server import run

    from janus_modular.config import load, resolve
    from janus_modular.janus import Janus
    from janus_modular.server.settings import RayConfig, ServerConfig, read_keys

    settings = resolve(load(config, overrides or ()), ServerConfig)
    flags = {"host": host, "port": port, "api_keys": None if api_keys is None else str(api_keys)}
    for name, value in flags.items():
        if value is not None:
            setattr(settings, name, value)
    keys = read_keys(settings)  # before the model is loaded
    options: dict[str, Any] = {"device": device, "dtype": dtype, "variant": variant}
    options["allow_failed"] = allow_failed
    options["runtime"] = runtime if threads is None else runtime_with_threads(model, runtime, threads)
    if ray:
        settings.ray = settings.ray or RayConfig()
    if settings.ray is not None:
        with require_extras("'serve --ray'", "serve", "ray"):
            from janus_modular.server.ray_serve import serve_in_ray

        serve_in_ray(model, options, settings, keys, print_address)
        return
    janus = Janus.from_pretrained(model, **options)
    run.serve(run.make_service(janus, settings, model), print_address)


def runtime_with_threads(model: str, runtime: str | None, threads: int) -> dict[str, Any]:
    """Return a bundle's runtime with its option ``threads``.

    Raises:
        ConfigError: the model is a checkpoint.
    """
    from janus_modular.bundles import RUNTIME, find_bundle
    from janus_modular.errors import ConfigError

    if not find_bundle(model):
        raise ConfigError(
            f"--threads {threads}: found a checkpoint, which runs in torch; expected a bundle. In torch, set"
            f" the variable OMP_NUM_THREADS={threads or 'N'} before the command."
        )
    return {"name": runtime or RUNTIME, "threads": threads}
