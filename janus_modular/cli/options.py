"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Annotated, Any

import typer


def finite(value: float | None) -> float | None:
    """Refuse what is no number before a model is loaded for it; 'nan' and 'inf' read as numbers too."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"found {value}; expected a finite number")
    return value


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
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Where chance starts; the same seed gives the same result. Left out: 0."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other setting of the model's sampling loop; may be repeated."
    ),
]


def settings_of(named: Mapping[str, Any], others: Sequence[str] | None) -> dict[str, Any]:
    """Collect the settings that were given; what is left out is the sampling loop's own to choose.

    Raises:
        BadParameter: one is not NAME=VALUE in YAML, or is given twice.
    """
    import yaml

    given = {name: value for name, value in named.items() if value is not None}
    for one in others or ():
        name, equals, value = one.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"--set {one}: expected NAME=VALUE")
        if name in given:
            raise typer.BadParameter(f"--set {one}: {name} is given already: {given[name]!r}; give it once")
        try:
            given[name] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # 2026-13-01 is a date that there is none of
            said = " ".join(str(error).split())
            raise typer.BadParameter(f"--set {one}: its value is not YAML: {said}") from error
    return given
