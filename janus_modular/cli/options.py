"""Options that several commands share, and checks of their values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer


def finite(value: float | None) -> float | None:
    """Check that a number is finite before a model is loaded for it: 'nan' and 'inf' parse as numbers."""
    if value is not None and not isfinite(value):
        raise typer.BadParameter(f"found {value}; expected a finite number")
    return value


def check_output(path: Path) -> None:
    """Check that a file can be written, before its content is computed.

    Raises:
        BadParameter: its folder is missing or not writable, the path is a folder, or the name is not valid.
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
    str, typer.Option(help="auto, cpu, cuda or mps; for a bundle also tensorrt, nv-tensorrt-rtx.")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32 (fp32), bfloat16 (bf16), float16 (fp16); auto: as stored, float32 on a CPU."
    ),
]
Runtime = Annotated[
    str | None, typer.Option(help="Runtime of a bundle: onnx (default), tensorrt, tensorrt-rtx.")
]
Variant = Annotated[
    str | None, typer.Option(help="Variant of a bundle: fp32, cpu-int4, ...; default: the first.")
]
AllowFailed = Annotated[
    bool,
    typer.Option("--allow-failed", help="For a bundle: open a variant that failed `verify`, or was edited."),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, help="Random seed; the same seed gives the same result. Default 0."),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        help="A registered sampler; default: the model's. `plugins list` shows them.", metavar="NAME"
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any other setting of the model's sampler; may be repeated."
    ),
]

SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def use_passive_waiting() -> None:
    """Make idle OpenMP threads sleep, unless ``OMP_WAIT_POLICY`` is set; call before torch is imported.

    Small models run many short parallel loops. On a busy machine, threads that spin between them wait for
    each other much longer than they compute; results do not depend on the policy.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def collect_settings(
    named: Mapping[str, Any], assignments: Sequence[str] | None, *, option: str = "--set"
) -> dict[str, Any]:
    """Collect the settings that were given; the sampler has defaults for all others.

    ``option``: that of the assignments, for errors.

    Raises:
        BadParameter: an assignment is not NAME=VALUE in YAML, or a setting is given twice.
    """
    import yaml

    from janus_modular.foreign import reason

    settings = {name: value for name, value in named.items() if value is not None}
    for assignment in assignments or ():
        name, equals, value = assignment.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{option} {assignment}: expected NAME=VALUE")
        if name in settings:
            raise typer.BadParameter(
                f"{option} {assignment}: {name} is given already: {settings[name]!r}; give it once"
            )
        try:
            parsed = yaml.safe_load(value)
        except Exception as error:  # an impossible date (2026-13-01), brackets nested too deeply
            raise typer.BadParameter(
                f"{option} {assignment}: its value is not YAML: {reason(error)}"
            ) from error
        is_number = isinstance(parsed, str) and SCIENTIFIC.fullmatch(parsed)  # PyYAML wants 2.0e+0
        settings[name] = float(parsed) if is_number else parsed
    return settings
