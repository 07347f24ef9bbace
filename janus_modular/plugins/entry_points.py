"""What installed distributions say they offer: read from metadata, nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from janus_modular.registry import API_VERSION, SLOTS
from janus_modular.suggest import did_you_mean

DEPRECATED: dict[int, str] = {}
"""Older versions of the plugin API that are still read, each with the release that will stop reading it."""

GROUP = re.compile(r"janus_modular\.v(?P<api>\d+)\.(?P<slot>\w+)")


@dataclass(frozen=True)
class EntryPointInfo:
    """One line of metadata: a component, its slot, and where it lives."""

    slot: str
    name: str
    module: str
    dist: str  # the distribution; of a local plugin, its file's name
    version: str = ""  # the distribution's
    api: int = API_VERSION  # version of the plugin API that it is written for
    file: Path | None = None  # of a local plugin

    @property
    def origin(self) -> str:
        """Who offers it, as people write it: ``acme-dino 0.2``."""
        return f"{self.dist} {self.version}".strip()

    def matches(self, word: str) -> bool:
        """Say whether ``word`` means it: its name, ``slot:name``, its distribution or ``dist:name``."""
        return word in (self.name, f"{self.slot}:{self.name}", self.dist, f"{self.dist}:{self.name}")

    def refusal(self) -> str | None:
        """Say why it must not be loaded, with the cure; None where it may."""
        if self.api != API_VERSION and self.api not in DEPRECATED:
            hint = (
                "upgrade with: pip install --upgrade janus-modular"
                if self.api > API_VERSION
                else f"upgrade it with: pip install --upgrade {self.dist}"
            )
            return f"it speaks version {self.api} of the plugin API, this is version {API_VERSION}; {hint}"
        if self.slot not in SLOTS:
            hint = did_you_mean(self.slot, SLOTS)
            return f"there is no slot '{self.slot}'. {hint} Slots: {', '.join(SLOTS)}".replace("  ", " ")
        return None

    def deprecation(self) -> str | None:
        """Say that it is loaded for some time only, with the cure; None where it speaks our version."""
        if self.api not in DEPRECATED:
            return None
        return (
            f"it speaks version {self.api} of the plugin API, this is version {API_VERSION}; "
            f"janus-modular {DEPRECATED[self.api]} stops reading it; "
            f"upgrade it with: pip install --upgrade {self.dist}"
        )


def installed(distributions: Iterable[metadata.Distribution] | None = None) -> list[EntryPointInfo]:
    """Return what distributions announce (default: all that are installed), sorted by slot and name.

    Where one speaks several versions of the plugin API, the version that we speak is taken, else the
    newest that we still read.
    """
    found: dict[tuple[str, str, str], EntryPointInfo] = {}
    seen: set[str] = set()
    for dist in metadata.distributions() if distributions is None else distributions:
        if "janus_modular.v" not in (dist.read_text("entry_points.txt") or ""):
            continue
        name = dist.metadata["Name"]
        if name in seen:  # an older copy, further down sys.path: not what an import would find
            continue
        seen.add(name)
        for point in dist.entry_points:
            group = GROUP.fullmatch(point.group)
            if not group:
                continue
            slot, api = group["slot"], int(group["api"])
            key = (slot, point.name, name)
            if key not in found or _preference(api) > _preference(found[key].api):
                found[key] = EntryPointInfo(slot, point.name, point.module, name, dist.version, api)
    return sorted(found.values(), key=lambda one: (one.slot, one.name, one.dist))


def _preference(api: int) -> tuple[bool, bool, int]:
    return api == API_VERSION, api in DEPRECATED, api
