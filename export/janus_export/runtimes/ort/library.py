"""The only import of ONNX Runtime, so that its version is always checked and its telemetry is off.

From 1.29 on it sends telemetry on Linux as soon as it is imported: it looks up a host of its vendor by DNS,
and writes a persistent device id below HOME. ``ORT_DISABLE_TELEMETRY=1`` disables that, and is set before the
import unless the environment sets the variable.
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib import metadata
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # reads the environment while it is imported

from janus_export.bundle.bundle import ONNX_RUNTIME
from janus_modular import ConfigError

__all__ = ["check_installation", "distributions", "onnxruntime"]


@cache
def distributions() -> tuple[str, ...]:
    """Return the installed distributions that provide the package ``onnxruntime``, with their versions.

    ``onnxruntime``, ``onnxruntime-gpu``, ``onnxruntime-openvino`` and others install the same files.
    """
    site = Path(onnxruntime.__file__).parents[1]
    names = {
        f"{distribution.metadata['Name']} {distribution.version}"
        for distribution in metadata.distributions(path=[str(site)])
        if "onnxruntime"
        in (distribution.read_text("top_level.txt") or distribution.metadata["Name"] or "").split()
    }
    return tuple(sorted(names))


def check_installation(needed: str = ONNX_RUNTIME) -> None:
    """Raise an error if ONNX Runtime is too old, or if several builds of it overwrite each other.

    Raises:
        ConfigError: in either case; names the installed distributions.
    """
    names = distributions()
    if len(names) > 1:
        words = [name.partition(" ")[0] for name in names]
        count = "both" if len(words) == 2 else "all"
        raise ConfigError(
            f"{' and '.join(words)} are {count} installed: they are one package"
            f" in {len(words)} builds, and overwrite each other. Keep one:\n"
            f"pip uninstall -y {' '.join(words)} && pip install 'onnxruntime-gpu[cuda,cudnn]>={ONNX_RUNTIME}'"
            f"  (without a GPU: 'onnxruntime>={ONNX_RUNTIME}')"
        )
    needed = max(needed, ONNX_RUNTIME, key=_numbers)
    if _numbers(onnxruntime.__version__) < _numbers(needed):
        name = names[0].partition(" ")[0] if names else "an unknown distribution"
        raise ConfigError(
            f"a bundle needs onnxruntime >= {needed}, found {onnxruntime.__version__} of {name}."
            f" Upgrade with: pip install --upgrade '{name if names else 'onnxruntime'}>={needed}'"
            + _other_build(name, needed)
        )


def _other_build(name: str, needed: str) -> str:
    """Return how to replace a build for which the needed version may not exist."""
    if name.startswith("an ") or name in ("onnxruntime", "onnxruntime-gpu"):
        return ""
    return f"; if it does not exist yet: pip uninstall -y {name} && pip install 'onnxruntime>={needed}'"


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version without suffixes: 1.25.0 of 1.25.0.dev20260401."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
