"""The command ``push``: a checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; created if needed.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="A branch; created if needed. Default: main.")
    ] = None,
    message: Annotated[
        str, typer.Option(metavar="TEXT", help="Of the commit.")
    ] = "Upload a model with janus-modular",
) -> None:
    """Verify a checkpoint and upload it to the Hugging Face hub, with its model card, as one commit.

    Example: janus-modular push runs/mine/model user/mine --private
    """
    from janus_modular.checkpoints.pushing import push as push_checkpoint

    typer.echo(push_checkpoint(model, repo, private=private, revision=revision, message=message))
