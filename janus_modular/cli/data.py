"""The commands ``data``: previews of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from janus_modular.cli.config import Overrides, TrainingConfig
from janus_modular.cli.options import check_output

app = typer.Typer(help="Training data: preview samples before training.", no_args_is_help=True)


@app.command()
def inspect(
    config: TrainingConfig,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of samples.")] = 8,
    step: Annotated[int, typer.Option(min=0, help="The step whose samples are shown, from 0.")] = 0,
    out: Annotated[str, typer.Option(help="An .html file to write; terminal: print text only.")] = "terminal",
) -> None:
    """Show samples of a training config as the model gets them, their supervised part, and the epochs.

    Example: janus-modular data inspect mine.yaml --out samples.html
    """
    from janus_modular.atomic_writes import write_text
    from janus_modular.config import load, resolve
    from janus_modular.errors import ConfigError
    from janus_modular.plugins import default_plugins
    from janus_modular.training.dry_run import epochs_table
    from janus_modular.training.sample_preview import as_html, as_text, preview_step
    from janus_modular.training.schema import TrainConfig

    if out != "terminal" and Path(out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: expected terminal, or the name of an .html file.")
    if out != "terminal":
        check_output(Path(out))  # before any data is read
    plugins = default_plugins()
    train_config = resolve(load(config, overrides or ()), TrainConfig, plugins)
    preview = preview_step(train_config, plugins, n=n, step=step)
    if out == "terminal":
        from rich.console import Console

        console = Console()
        for sample in preview.samples:
            console.print(as_text(sample))
        console.print(epochs_table(preview.mixture, preview.steps))
        return
    path = Path(out)
    try:
        write_text(path, as_html(preview, title=config))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}. Choose another file.") from error
    typer.echo(path)
