"""Reads from metadata which components installed distributions provide; no plugin is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from janus_modular.registry import API_VERSION, SLOTS
from janus_modular.suggest import did_you_mean

GROUP = re.compile(r"janus_modular\.v(?P<api>\d+)\.(?P<slot>\w+)")


@dataclass(frozen=True)
class EntryPointInfo:
    """A declared component: its slot and name, the module that registers it, and who provides it."""

    slot: str
    name: str
    module: str
    dist: str  # the distribution's name; a local plugin's file name
    version: str = ""  # of the distribution
    api: int = API_VERSION  # version of the plugin API that it is written for
    file: Path | None = None  # of a local plugin

    @property
    def origin(self) -> str:
        """The distribution with its version: ``acme-dino 0.2``."""
        return f"{self.dist} {self.version}".strip()

    def matches(self, word: str) -> bool:
        """Return True if ``word`` names the entry point: ``name``, ``slot:name``, ``dist``, ``dist:name``."""
        return word in (self.name, f"{self.slot}:{self.name}", self.dist, f"{self.dist}:{self.name}")

    def incompatibility(self) -> str | None:
        """Return why the component cannot be loaded by this version, with a hint; None if it can."""
        if self.api != API_VERSION:
            package = "janus-modular" if self.api > API_VERSION else self.dist
            return (
                f"it is written for version {self.api} of the plugin API, this is version {API_VERSION};"
                f" upgrade with: pip install --upgrade {package}"
            )
        if self.slot not in SLOTS:
            hint = did_you_mean(self.slot, SLOTS)
            return f"there is no slot '{self.slot}'. {hint} Slots: {', '.join(SLOTS)}".replace("  ", " ")
        return None


def installed(distributions: Iterable[metadata.Distribution] | None = None) -> list[EntryPointInfo]:
    """Return what distributions declare (default: all that are installed), sorted by slot and name.

    Of a component that is declared for several versions of the plugin API, ours is returned.
    """
    declared: dict[tuple[str, str, str], EntryPointInfo] = {}
    seen: set[str] = set()
    for dist in metadata.distributions() if distributions is None else distributions:
        if "janus_modular.v" not in (dist.read_text("entry_points.txt") or ""):
            continue
        name = dist.metadata["Name"]
        if name in seen:  # an older copy, further down sys.path, which an import would not find
            continue
        seen.add(name)
        for point in dist.entry_points:
            group = GROUP.fullmatch(point.group)
            if not group:
                continue
            slot, api = group["slot"], int(group["api"])
            key = (slot, point.name, name)
            if key not in declared or api == API_VERSION:
                declared[key] = EntryPointInfo(slot, point.name, point.module, name, dist.version, api)
    return sorted(declared.values(), key=lambda info: (info.slot, info.name, info.dist))
