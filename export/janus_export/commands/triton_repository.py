"""``triton``: a bundle as a model repository of NVIDIA's Triton. Needs neither torch nor ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def triton(
    folder: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder that `export` wrote.")],
    repository: Annotated[Path, typer.Argument(metavar="REPOSITORY", help="A new folder.")],
    variant: Annotated[str | None, typer.Option(help="Variant to serve; default: the first.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch of answers and drawings.")] = 8,
) -> None:
    """Write a model repository for Triton: a model that answers and draws, and the encoders and the decoder.

    Example: janus-modular triton bundle models --rows 16
    """
    from janus_export.triton.repository import write_repository

    for name, path in write_repository(folder, repository, variant=variant, rows=rows).items():
        typer.echo(f"{name}: {path}")
