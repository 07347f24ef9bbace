"""The command ``train``: train a stage, or describe the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from janus_modular.cli.config import Overrides, TrainingConfig
from janus_modular.cli.options import use_passive_waiting


def train(
    config: TrainingConfig,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in output.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print trainable modules, memory and samples of a step; do not train."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No table, no progress bar, no loss lines.")] = False,
) -> None:
    """Train a model as a training config describes, or all stages of a chain of configs.

    A bar in a terminal shows the progress; elsewhere, a line with the losses every log_every steps.

    Example: janus-modular train mine.yaml optimizer.lr=1e-4 --dry-run
    """
    use_passive_waiting()
    from janus_modular.config import load, resolve
    from janus_modular.plugins import default_plugins
    from janus_modular.training.chain import load_stages
    from janus_modular.training.schema import TrainConfig

    plugins = default_plugins()
    chain = load_stages(config, overrides or (), plugins)
    stages = chain or {config: resolve(load(config, overrides or (), plugins), TrainConfig, plugins)}
    if dry_run:
        from rich.console import Console

        from janus_modular.training.dry_run import dry_run as print_dry_run
        from janus_modular.training.run_chain import dry_run_chain

        if chain:
            dry_run_chain(chain, plugins, Console(), resume=resume)
        else:
            print_dry_run(stages[config], plugins, Console(), resume=resume)
        return
    from janus_modular.training import train as training
    from janus_modular.training.processes import Processes
    from janus_modular.training.run_chain import train_chain

    try:
        if chain:
            model = train_chain(chain, resume=resume, quiet=quiet, plugins=plugins)
        else:
            model = training.train(stages[config], resume=resume, quiet=quiet, title=config, plugins=plugins)
    except KeyboardInterrupt:
        from janus_modular.training.run_folder import newest_checkpoint

        if Processes.from_environment().is_first:
            checkpoints = [newest_checkpoint(Path(stage.output)) for stage in stages.values()]
            saved = next((checkpoint for checkpoint in reversed(checkpoints) if checkpoint), None)
            hint = f"continue from {saved.name} with: --resume" if saved else "nothing was saved yet"
            typer.echo(f"stopped: {hint}", err=True)
        raise typer.Exit(130) from None
    if Processes.from_environment().is_first:
        typer.echo(model)
