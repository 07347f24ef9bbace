"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; auto is as stored, float32 on a CPU.")
]
Seed = Annotated[int, typer.Option(help="Where chance starts; the same seed gives the same result.")]
