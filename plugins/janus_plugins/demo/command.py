"""``demo``: train a small Janus on real images, ask it, let it draw."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class DemoGroup(TyperGroup):
    """Runs the demo itself unless another command of the group is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``run`` before what is not a command."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DemoGroup,
    help="Train a small Janus on real handwritten digits, ask it, let it draw.",
    add_completion=False,
)
Config = Annotated[str, typer.Option(help="A YAML file, or a shipped name.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Changes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command()
def run(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the report and the model.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of all chance.")] = 0,
    config: Config = "demo/digits",
    quiet: Quiet = False,
) -> None:
    """Train, measure and report: minutes on two CPU cores. It is what demo alone does.

    A demo that was interrupted goes on where it stopped, if its settings are the same.
    """
    from janus_modular.config import load, resolve
    from janus_plugins.demo.run import run_demo
    from janus_plugins.demo.schema import DemoConfig

    chosen = resolve(load(config, [f"seed={seed}", *(overrides or [])]), DemoConfig)
    run_demo(chosen, out, quiet=quiet)


@app.command()
def ablation(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the runs.")] = Path("runs/ablation"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    config: Config = "demo/digits",
    quiet: Quiet = False,
) -> None:
    """Compare two encoders, one for reading and one for drawing, with one shared VQ encoder."""
    from janus_modular.config import load
    from janus_plugins.demo.ablation import run_ablation

    run_ablation(load(config, overrides or []), out, seeds=seeds, quiet=quiet)
