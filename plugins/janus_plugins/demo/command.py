"""The command ``demo``: train and evaluate a small Janus on real images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from janus_modular.cli.options import use_passive_waiting


class DemoGroup(TyperGroup):
    """A group whose default command is ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert ``run`` unless the line names a command of the group."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DemoGroup,
    help="Train and evaluate a small Janus on real handwritten digits.",
    add_completion=False,
)
Config = Annotated[str, typer.Option(help="A YAML file, or a shipped name.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[A.B=C]...", help="Overrides: A.B=C sets the key A.B to C.")
]
MODULES = ("torch", "sklearn", "matplotlib")
"""Of the extra `demo`, the modules that are checked before anything is computed."""
Force = Annotated[
    bool, typer.Option("--force", help="Remove what another run left in the folder, and train again.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars, no loss lines.")]


@app.command()
def run(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the report and the model.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of weights, samples and drawings.")] = 0,
    config: Config = "demo/digits",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train, evaluate and report: minutes on two CPU cores. The default command of the group.

    An interrupted demo is continued if its settings are the same, and a finished one is left as it is.

    Example: janus-modular demo run --out runs/demo
    """
    use_passive_waiting()
    from janus_modular.config import load, resolve
    from janus_modular.errors import require_extras

    with require_extras("'demo'", "demo", modules=MODULES):
        from janus_plugins.demo.run import run_demo
        from janus_plugins.demo.schema import DemoConfig

    resolved = resolve(load(config, [f"seed={seed}", *(overrides or [])]), DemoConfig)
    run_demo(resolved, out, quiet=quiet, force=force)


@app.command()
def ablation(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the runs.")] = Path("runs/ablation"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    config: Config = "demo/digits",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Compare separate encoders for understanding and generation with one shared VQ encoder.

    Example: janus-modular demo ablation --seeds 1
    """
    use_passive_waiting()
    from janus_modular.config import load
    from janus_modular.errors import require_extras

    with require_extras("'demo ablation'", "demo", modules=MODULES):
        from janus_plugins.demo.ablation import run_ablation

    run_ablation(load(config, overrides or []), out, seeds=seeds, quiet=quiet, force=force)
