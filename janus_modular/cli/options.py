"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer


def finite(value: float | None) -> float | None:
    """Refuse what is no number before a model is loaded for it; 'nan' and 'inf' read as numbers too."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"found {value}; expected a finite number")
    return value


def check_output(path: Path) -> None:
    """Refuse the name of a file that cannot be written, before the work that it is for.

    Raises:
        BadParameter: its folder is missing or closed, it is a folder itself, or no file can be called so.
    """
    from janus_modular.foreign import printable, reason

    name = printable(path, most=200)
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name too long, a NUL in it, a file among its folders
        raise typer.BadParameter(f"'{name}' cannot be written: {reason(error)}") from error
    if path.is_dir():
        raise typer.BadParameter(f"'{name}' is a folder; expected the name of a file")
    if not path.parent.is_dir():
        parent = printable(path.parent, most=200)
        raise typer.BadParameter(f"there is no folder '{parent}' to write '{printable(path.name)}' into")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"the folder of '{name}' may not be written into")


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
AllowFailed = Annotated[
    bool,
    typer.Option(
        "--allow-failed", help="Of a bundle: open a variant that `verify` found wrong, or that was edited."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Where chance starts; the same seed gives the same result. Left out: 0."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other setting of the model's sampler; may be repeated."
    ),
]


def settings_of(named: Mapping[str, Any], others: Sequence[str] | None) -> dict[str, Any]:
    """Collect the settings that were given; the sampler has defaults for all others.

    Raises:
        BadParameter: one is not NAME=VALUE in YAML, or is given twice.
    """
    import yaml

    from janus_modular.foreign import reason

    given = {name: value for name, value in named.items() if value is not None}
    for one in others or ():
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"--set {one}: expected NAME=VALUE")
        if name in given:
            raise typer.BadParameter(f"--set {one}: {name} is given already: {given[name]!r}; give it once")
        try:
            given[name] = yaml.safe_load(value)
        except Exception as error:  # 2026-13-01 is a date that there is none of; brackets may nest too deeply
            raise typer.BadParameter(f"--set {one}: its value is not YAML: {reason(error)}") from error
    return given
