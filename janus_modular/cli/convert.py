"""The command ``convert``: a checkpoint in another format or dtype."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

MAX_SIZE = 2**63 - 1
"""Largest size of a file, in bytes."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint: a folder, or a hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A.B=C]...", help="Overrides of the model config: processor.template=janus."),
    ] = None,
    format_name: Annotated[
        str,
        typer.Option("--format", help="native, published (the authors'), transformers, or a plugin's."),
    ] = "native",
    dtype: Annotated[
        str, typer.Option(help="float32 (fp32), bfloat16 (bf16), float16 (fp16); auto: as stored.")
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Maximum file size, for example 500MB.")
    ] = "5GB",
    merge: Annotated[bool, typer.Option("--merge", help="Merge adapters (LoRA) into the weights.")] = False,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the averaged weights of a run's checkpoint.")
    ] = False,
) -> None:
    """Write a checkpoint in another format, tensor by tensor, which needs little memory.

    Example: janus-modular convert deepseek-ai/Janus-Pro-1B janus-pro --format native
    """
    import torch

    from janus_modular.checkpoints import convert as convert_checkpoint
    from janus_modular.checkpoints.native import working_dtype
    from janus_modular.training.ema import read_averages

    convert_checkpoint(
        source,
        target,
        format_name=format_name,
        dtype=None if dtype == "auto" else working_dtype(dtype, torch.device("cpu"), {}),
        max_shard_size=size_in_bytes(max_shard_size),
        merge=merge,
        overrides=overrides or (),
        replacements=read_averages(Path(source)) if ema else None,
    )
    typer.echo(f"{target}: written in the {format_name} format")


def size_in_bytes(text: str) -> int:
    """Return the number of bytes of ``5GB``, ``500 MB`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B|)", text.strip().upper().removesuffix("B") + "B")
    if not match:
        raise typer.BadParameter(f"'{text}' is not a size: write 5GB, 500MB or a number of bytes")
    size = float(match[1]) * UNITS[match[2] if match[2] != "B" else ""]
    if size > MAX_SIZE:
        raise typer.BadParameter(f"'{text:.80}' is larger than any file: write 5GB, for example")
    if size < 1:
        raise typer.BadParameter(f"'{text}' is less than one byte: write 5GB, 500MB or a number of bytes")
    return int(size)
