"""The command ``ui``: a web page for a model, or for a running server."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from janus_modular.cli.options import AllowFailed, Device, Dtype, Runtime, Variant, use_passive_waiting

KEY_VARIABLE = "OPENAI_API_KEY"


def ui(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint folder, a hub id, a bundle; or a server: http://127.0.0.1:8000.",
        ),
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the page, at 127.0.0.1; 0: any free port.")
    ] = 7860,
    rows: Annotated[int, typer.Option(min=1, help="Of the batch that the model runs in.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    runtime: Runtime = None,
    variant: Variant = None,
    allow_failed: AllowFailed = False,
) -> None:
    """Open a web page: chat with images, and drawing. It works offline, for this machine alone.

    The key of a server is read from the variable OPENAI_API_KEY.

    Example: janus-modular ui runs/demo/model
    """
    from contextlib import ExitStack, closing
    from tempfile import TemporaryDirectory

    from janus_modular.bundles import extras_to_open
    from janus_modular.errors import require_extras

    use_passive_waiting()
    is_server = model.startswith(("http://", "https://"))
    if is_server:
        options = {"rows": (rows, 8), "device": (device, "auto"), "dtype": (dtype, "auto")}
        options |= {"runtime": (runtime, None), "variant": (variant, None)}
        options |= {"allow-failed": (allow_failed, False)}
        without_effect = [f"--{name}" for name, (value, default) in options.items() if value != default]
        if without_effect:
            raise typer.BadParameter(
                f"{', '.join(without_effect)}: has no effect on a server that runs already; leave it out"
            )
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    extras, modules = ((), ()) if is_server else extras_to_open(model, runtime)
    with require_extras("'ui'", "ui", *extras, modules=modules):
        from janus_modular.server.run import serving_in_background
        from janus_modular.server.settings import ServerConfig
        from janus_modular.ui.api_client import ApiClient
        from janus_modular.ui.page import launch, make_page

    from janus_modular.janus import Janus

    with ExitStack() as stack:
        # Gradio keeps copies of all images here, and deletes them only if no browser holds a connection.
        os.environ["GRADIO_TEMP_DIR"] = stack.enter_context(TemporaryDirectory(prefix="janus-page-"))
        address, key = model, os.environ.get(KEY_VARIABLE)
        if not is_server:
            janus = Janus.from_pretrained(
                model, device=device, dtype=dtype, runtime=runtime, variant=variant, allow_failed=allow_failed
            )
            config = ServerConfig(port=0, rows=rows, log="none")
            address, key = stack.enter_context(serving_in_background(janus, config, model)), None
        launch(make_page(stack.enter_context(closing(ApiClient(address, key)))), port)
