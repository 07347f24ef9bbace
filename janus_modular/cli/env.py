"""The command ``env``: the facts that a bug report needs about the machine and the installation."""

from __future__ import annotations

import json
import os
import platform
import sys
from typing import Annotated, Any

import typer


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, extras, devices and plugins, for a bug report.

    Example: janus-modular env
    """
    facts = gather()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for heading, lines in facts.items():
        typer.echo(f"{heading}:")
        for key, value in lines.items():
            typer.echo(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")


def gather() -> dict[str, dict[str, Any]]:
    """Return the facts by heading."""
    from janus_modular import __version__
    from janus_modular.plugins import default_plugins
    from janus_modular.registry import SLOTS
    from janus_modular.training.run_environment import PACKAGES, version

    plugins = default_plugins()
    third_party = sorted({point.origin for point in plugins.entry_points if point.dist != "janus-modular"})
    return {
        "versions": {
            "janus-modular": __version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            "platform": platform.platform(),
            **{name: version(name) for name in PACKAGES},
        },
        "extras": _extras(),
        "devices": _devices(),
        "components": {slot: plugins.names(slot) for slot in SLOTS},
        "plugins": {"third party": third_party or ["none"], "disabled": list(plugins.disabled) or ["none"]},
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("JANUS_")},
    }


def _extras() -> dict[str, str]:
    """Return for each extra whether it is complete, with the extras that it includes."""
    from janus_modular.errors import EXTRAS, missing_extras, pip_line

    states = {}
    for extra in EXTRAS:
        missing = missing_extras(extra)
        states[extra] = f"lacks {', '.join(missing)}: {pip_line([extra])}" if missing else "complete"
    return states


def _devices() -> dict[str, str]:
    try:
        import torch
    except ModuleNotFoundError:
        return {"none": "torch is not installed: pip install 'janus-modular[torch]'"}
    devices = {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        devices[f"cuda:{index}"] = f"{gpu.name}, {memory:.1f} GiB, compute {gpu.major}.{gpu.minor}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices
