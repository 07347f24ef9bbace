"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint folder, a hub id, or a bundle.")
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or mps; of a bundle also tensorrt, nv-tensorrt-rtx.")
]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; auto is as stored, float32 on a CPU.")
]
Runtime = Annotated[
    str | None, typer.Option(help="What runs a bundle: onnx (left out), tensorrt, tensorrt-rtx.")
]
Variant = Annotated[str | None, typer.Option(help="Of a bundle: fp32, cpu-int4, ...; left out: its first.")]
Seed = Annotated[int, typer.Option(min=0, help="Where chance starts; the same seed gives the same result.")]
