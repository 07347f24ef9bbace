"""Locks the plugins of a model: the bytes of their files, recorded beside its checkpoint or bundle.

Opening a model runs its plugins. With a lock beside the model, plugins whose files have changed since
are refused before any of them is imported.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from janus_modular.atomic_writes import atomic_replace
from janus_modular.errors import PluginError, list_briefly
from janus_modular.foreign import foreign_errors, sha256
from janus_modular.plugins.catalogue import BUILT_IN, Plugins
from janus_modular.plugins.entry_points import EntryPointInfo
from janus_modular.registry import API_VERSION, SAMPLER_SETTINGS, slot_label

LOCK = "plugins.lock.json"

FORMAT = 1

log = logging.getLogger(__name__)

UNSIGNED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
"""Files of a distribution's metadata that each installation rewrites."""

Records = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class LockReport:
    """The plugins of a lock and of this environment, by distribution or file."""

    checked: list[str] = field(default_factory=list)  # the files are those that were locked
    skipped: list[str] = field(default_factory=list)  # not installed, and a bundle runs without them
    unneeded: list[str] = field(default_factory=list)  # of those above: no recorded component is theirs
    unlocked: list[str] = field(default_factory=list)  # installed, and not in the lock


def write_lock(folder: Path, plugins: Plugins) -> Path:
    """Write the lock of the plugins that a checkpoint or a bundle records; return its path.

    Raises:
        PluginError: the folder records no plugins, or one of them is not installed.
    """
    content = {"format": FORMAT, "api": API_VERSION, "plugins": _locked(plugins, recorded_plugins(folder))}
    path = folder / LOCK
    with atomic_replace(path, error=PluginError) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return path


def check_lock(folder: Path, plugins: Plugins) -> LockReport:
    """Check the installed plugins against the lock of a folder, if it has one.

    Nothing is imported here: files are read and hashed.

    Raises:
        PluginError: lists every plugin that has changed, with its files, and every recorded component that is
            not locked; or the lock cannot be read.
    """
    path = folder / LOCK
    if not path.is_file():
        return LockReport()
    with foreign_errors(path, PluginError, f"Lock again: janus-modular plugins lock {folder}"):
        lock = json.loads(path.read_text("utf-8"))
        if lock["format"] != FORMAT:
            raise PluginError(
                f"{path} is of format {lock['format']!r:.20}, this version reads format {FORMAT}. Lock again:"
                f" janus-modular plugins lock {folder}"
            )
        is_bundle = (folder / "manifest.json").is_file()
        needed = [locked for locked in lock["plugins"] if not (is_bundle and _is_unused(locked, plugins))]
        errors = [change for locked in needed if (change := _change(locked, plugins))]
        recorded = recorded_plugins(folder)
        known = {_key(component) for locked in lock["plugins"] for component in locked["components"]}
        errors += [
            f"the {slot_label(component['slot'])} '{component['name']}' is recorded, but not locked"
            for component in recorded
            if _key(component) not in known
        ]
        if lock["api"] != API_VERSION:
            errors.append(f"the plugin API is version {API_VERSION}, locked was version {lock['api']}")
    if errors:
        locked = {item["plugin"] for item in lock["plugins"]} - {BUILT_IN}
        is_imported = any(info.dist in locked and info.module in sys.modules for info in plugins.entry_points)
        raise PluginError(
            f"{folder} has locked its plugins, and something has changed since"
            f"{'' if is_imported else '; none was imported'}.\n"
            + "\n".join(errors)
            + "\nInstall what was locked; or, if the change is wanted, lock again: janus-modular plugins lock"
            f" {folder}"
        )
    return _report(lock["plugins"], needed, recorded, plugins)


def carry_lock(folder: Path, written: Path, plugins: Plugins) -> None:
    """Copy the lock of ``folder`` to ``written``, its new content, if it holds for that; else log that."""
    if (folder / LOCK).is_file():
        shutil.copyfile(folder / LOCK, written / LOCK)
        drop_outdated_lock(written, folder, plugins)


def drop_outdated_lock(written: Path, folder: Path, plugins: Plugins) -> None:
    """Remove the lock in ``written``, the new content of ``folder``, if it is of other plugins; log that."""
    try:
        check_lock(written, plugins)
    except PluginError:
        (written / LOCK).unlink()
        log.warning(
            "%s is written again with other plugins than those in its %s, which is removed. Lock again:"
            " janus-modular plugins lock %s",
            *(folder, LOCK, folder),
        )


def _report(locks: Records, needed: Records, recorded: Records, plugins: Plugins) -> LockReport:
    """Return what a lock holds, and what it does not, once nothing in it has changed."""
    checked = [str(locked["plugin"]) for locked in needed]
    names = {str(locked["plugin"]): {_key(item) for item in locked["components"]} for locked in locks}
    used = {_key(component) for component in recorded}
    return LockReport(
        checked=checked,
        skipped=[name for name in names if name not in checked],
        unneeded=[name for name, components in names.items() if not components & used],
        unlocked=sorted({info.dist for info in plugins.entry_points} - names.keys()),
    )


def plugin_digests(plugins: Plugins, components: Records) -> list[dict[str, Any]]:
    """Return name, version and one hash over all files of each plugin that provides one of the components.

    A plugin that cannot be used here is left out: training, for example, needs no sampler.
    """
    return [
        {
            "plugin": entry["plugin"],
            "version": entry["version"],
            "sha256": hashlib.sha256(json.dumps(entry["files"], sort_keys=True).encode()).hexdigest(),
        }
        for entry in _locked(plugins, [item for item in components if _is_usable(item, plugins)])
    ]


def recorded_plugins(folder: Path) -> list[dict[str, Any]]:
    """Return the components that a native checkpoint or a bundle records, with their plugins.

    Raises:
        PluginError: the folder is neither.
    """
    for name in ("manifest.json", "config.json"):
        path = folder / name
        if path.is_file():
            with foreign_errors(path, PluginError, "Fetch it again."):
                record = json.loads(path.read_text("utf-8"))
                if isinstance(record.get("plugins"), list):
                    return [
                        {key: item.get(key) for key in ("slot", "name", "dist")} for item in record["plugins"]
                    ]
    if not folder.is_dir():
        raise PluginError(
            f"there is no folder {folder}; expected a bundle or a native checkpoint. Check the path."
        )
    raise PluginError(
        f"{folder} records no plugins; expected a bundle or a checkpoint of the format native. To write one:"
        f" janus-modular convert {folder} NEW --format native"
    )


def _key(component: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return component["slot"], component["name"], component["dist"]


def _find(component: Mapping[str, Any], plugins: Plugins) -> EntryPointInfo:
    """Return the component of a record, of the recorded distribution."""
    name = f"{component['dist']}:{component['name']}" if component.get("dist") else component["name"]
    return plugins.find(component["slot"], name)


def _is_usable(component: Mapping[str, Any], plugins: Plugins) -> bool:
    try:
        return bool(_find(component, plugins))
    except PluginError:
        return False


def _locked(plugins: Plugins, components: Records) -> list[dict[str, Any]]:
    """Return the entries of a lock, one for each distribution or file that provides a component."""
    provided: dict[str, list[EntryPointInfo]] = {}
    for component in components:
        info = _find(component, plugins)
        provided.setdefault(info.dist, []).append(info)
    return [_entry(dist, infos) for dist, infos in sorted(provided.items())]


def _entry(dist: str, infos: list[EntryPointInfo]) -> dict[str, Any]:
    first = infos[0]
    components = [
        {"slot": info.slot, "name": info.name, "dist": None if info.file else dist} for info in infos
    ]
    record, files = None, {}
    if first.file:
        files = {first.file.name: first.file}
    else:
        distribution = metadata.distribution(dist)
        files = _files(distribution, {info.module.partition(".")[0] for info in infos})
        text = distribution.read_text("RECORD")
        record = (
            hashlib.sha256(text.encode()).hexdigest() if text and not _is_editable(distribution) else None
        )
    return {
        "plugin": dist,
        "version": first.version,
        "record_sha256": record,
        "files": {name: sha256(path) for name, path in sorted(files.items()) if path.is_file()},
        "components": sorted(components, key=lambda item: (item["slot"], item["name"])),
    }


def _files(distribution: metadata.Distribution, packages: set[str]) -> dict[str, Path]:
    """Return the installed files of a distribution by name; of an editable one those of its packages."""
    if not _is_editable(distribution):
        return {
            str(file): Path(str(file.locate()))
            for file in distribution.files or ()
            if file.suffix != ".pyc" and file.name not in UNSIGNED and ".." not in file.parts
        }
    files: dict[str, Path] = {}
    for package in sorted(packages):
        spec = find_spec(package)  # of a name without dots: nothing is imported
        folders = [Path(location) for location in (spec and spec.submodule_search_locations) or ()]
        if spec and spec.origin and not folders:
            files[Path(spec.origin).name] = Path(spec.origin)
        for folder in folders:
            paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
            files |= {f"{package}/{path.relative_to(folder).as_posix()}": path for path in paths}
    return files


def _is_editable(distribution: metadata.Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _is_unused(locked: Mapping[str, Any], plugins: Plugins) -> bool:
    """Return True if a bundle runs without a plugin: it is not installed, and provides no sampler."""
    installed = any(info.dist == locked["plugin"] for info in plugins.entry_points)
    return not installed and SAMPLER_SETTINGS.keys().isdisjoint(item["slot"] for item in locked["components"])


def _change(locked: Mapping[str, Any], plugins: Plugins) -> str:
    """Return what differs between a plugin's entry in a lock and what is installed; "" if nothing does."""
    label = " ".join(filter(None, (locked["plugin"], locked["version"])))
    try:
        present = next(iter(_locked(plugins, locked["components"])))
    except PluginError as error:
        return f"{label}: {error}"
    if locked["version"] != present["version"]:
        return f"{label}: version {present['version']} is installed"
    before, now = locked["files"], present["files"]
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        return f"{label}: other bytes in {list_briefly(changed, 3)}"
    return "" if present == locked else f"{label}: its RECORD or its components are others"
