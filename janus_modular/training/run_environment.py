"""What a run was made with: the commit of its working directory, versions, and plugins. Imports no torch."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from janus_modular.plugins import Plugins
from janus_modular.plugins.lock import plugin_digests

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow", "omegaconf", "pluggy")
"""The packages whose versions are recorded."""

MAX_CHANGED = 50
"""Changed files that are named."""


def run_environment(plugins: Plugins, components: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the record for the checkpoints of a run; ``components`` are those that it uses."""
    return {
        "git": git_state(Path.cwd()),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "plugins": plugin_digests(plugins, components),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit and the changed files of the repository around a folder; None without one.

    The content of changed files is not recorded: it may be private.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = [line[3:] for line in (_git(folder, "status", "--porcelain") or "").splitlines()]
    branch = (_git(folder, "rev-parse", "--abbrev-ref", "HEAD") or "").strip()
    return {
        "commit": commit.strip(),
        "branch": None if branch == "HEAD" else branch,
        "changed": changed[:MAX_CHANGED],
        "num_changed": len(changed),
    }


def version(name: str) -> str:
    """Return the version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None where it fails, or is not installed."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.decode("utf-8", "backslashreplace")
