"""``info``: what a model is made of."""

from __future__ import annotations

from typing import Annotated

import typer


def info(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a YAML file or a shipped model config.")],
) -> None:
    """Say a model's layout, components, dtypes, parameters and plugins."""
    raise NotImplementedError(model)
