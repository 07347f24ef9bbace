"""Opening a bundle: an exported model, which a plugin runs. Needs neither torch nor the exporter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_modular.building import Builder
from janus_modular.config import resolve
from janus_modular.interfaces import Part, part
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.processor import Processor
from janus_modular.roles import Runtime

MANIFEST = "manifest.json"
"""What a bundle's folder has, and a checkpoint's has not."""

RUNTIME = "onnx"
"""The runtime that is taken where nobody chooses."""


@dataclass
class Running:
    """How a bundle is to be run."""

    runtime: Part = part("runtimes")


def is_bundle(path: str | Path) -> bool:
    """Say whether a path is a bundle's folder."""
    try:
        return (Path(path).expanduser() / MANIFEST).is_file()
    except (OSError, RuntimeError):  # no file can be called so: whoever opens it has more to say
        return False


def open_bundle(
    folder: str | Path,
    *,
    runtime: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    device: str = "auto",
    plugins: Plugins | None = None,
) -> tuple[Runtime, Processor, Plugins]:
    """Open a bundle in a runtime: a registered name, or ``{"name": ..., **options}``.

    The plugins are those given (or all), with names that several share meaning what the bundle recorded.
    Of what it recorded only the sampling loop that is used is needed: everything else is in its graphs.

    Raises:
        JanusError: the bundle is damaged, or the runtime, the variant or the device is not here.
    """
    plugins = plugins or default_plugins()
    folder = Path(folder).expanduser()
    chosen = {"name": runtime} if isinstance(runtime, str) else dict(runtime or {})
    chosen = {"name": RUNTIME, "device": device, **chosen}
    if variant is not None:
        chosen["variant"] = variant
    one = resolve({"runtime": chosen}, Running, plugins).runtime
    opened: Runtime = Builder(plugins, paths={id(one): "runtime"})(one, folder)
    recorded = json.loads((folder / MANIFEST).read_text("utf-8")).get("plugins", [])  # the runtime read it
    return opened, Processor.load(folder), plugins.as_recorded(recorded)
