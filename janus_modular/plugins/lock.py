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
from importlib.machinery import all_suffixes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from janus_modular.atomic_writes import atomic_replace
from janus_modular.errors import PluginError, list_briefly
from janus_modular.foreign import foreign_errors, sha256
from janus_modular.plugins.catalogue import Plugins
from janus_modular.plugins.entry_points import EntryPointInfo
from janus_modular.registry import API_VERSION, SAMPLER_SETTINGS, slot_label

LOCK = "plugins.lock.json"

FORMAT = 1

log = logging.getLogger(__name__)

UNSIGNED = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
"""Files of a distribution's metadata that each installation rewrites."""

Records = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class LockDifference:
    """A plugin that is not as it was locked, or a component that should be locked."""

    plugin: str  # distribution or file; "" where the lock differs as a whole
    reason: str  # what differs, for people
    changed: list[str] = field(default_factory=list)  # files with other bytes
    added: list[str] = field(default_factory=list)  # files that the lock does not have
    removed: list[str] = field(default_factory=list)  # files that the lock alone has


@dataclass(frozen=True)
class LockReport:
    """The plugins of a lock and of this environment, by distribution or file."""

    checked: list[str] = field(default_factory=list)  # the files are those that were locked
    skipped: list[str] = field(default_factory=list)  # not usable here, and a bundle runs without them
    unneeded: list[str] = field(default_factory=list)  # of those above: no recorded component is theirs
    unlocked: list[str] = field(default_factory=list)  # installed, and not in the lock
    differences: list[LockDifference] = field(default_factory=list)


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


def check_lock(folder: Path, plugins: Plugins) -> None:
    """Check the installed plugins against the lock of a folder, if it has one.

    Nothing is imported here: files are read and hashed.

    Raises:
        PluginError: lists every plugin that has changed, with its files, and every recorded component that is
            not locked; or the lock cannot be read.
    """
    if (folder / LOCK).is_file():
        refuse_differences(folder, compare_lock(folder, plugins), plugins)


def compare_lock(folder: Path, plugins: Plugins) -> LockReport:
    """Compare the installed plugins with the lock of a folder; as `check_lock`, which raises an error.

    Raises:
        PluginError: the lock cannot be read.
    """
    path = folder / LOCK
    with foreign_errors(path, PluginError, f"Lock again: janus-modular plugins lock {folder}"):
        lock = json.loads(path.read_text("utf-8"))
        if lock["format"] != FORMAT:
            raise PluginError(
                f"{path} is of format {lock['format']!r:.20}, this version reads format {FORMAT}. Lock again:"
                f" janus-modular plugins lock {folder}"
            )
        is_bundle = (folder / "manifest.json").is_file()
        needed = [locked for locked in lock["plugins"] if not (is_bundle and _is_unused(locked, plugins))]
        differences = [change for locked in needed if (change := _difference(locked, plugins))]
        recorded = recorded_plugins(folder)
        known = {_key(component) for locked in lock["plugins"] for component in locked["components"]}
        differences += [
            LockDifference(
                str(component["dist"] or ""),
                f"the {slot_label(component['slot'])} '{component['name']}' is recorded, but not locked",
            )
            for component in recorded
            if _key(component) not in known
        ]
        if lock["api"] != API_VERSION:
            reason = f"the plugin API is version {API_VERSION}, locked was version {lock['api']}"
            differences.append(LockDifference("", reason))
    return _report(lock["plugins"], needed, recorded, plugins, differences)


def refuse_differences(folder: Path, report: LockReport, plugins: Plugins) -> None:
    """Raise an error if a report has differences.

    Raises:
        PluginError: lists them, with a hint.
    """
    if not report.differences:
        return
    changed = {difference.plugin for difference in report.differences}
    is_imported = any(info.dist in changed and info.module in sys.modules for info in plugins.entry_points)
    disabled = {info.dist for info in plugins.entry_points if not plugins.is_enabled(info)}
    hint = (
        "Install what was locked; or, if the change is wanted, lock again: janus-modular plugins lock"
        f" {folder}"
    )
    raise PluginError(
        f"{folder} has locked its plugins, and something has changed since"
        f"{'' if is_imported else '; none was imported'}.\n"
        + "\n".join(difference.reason for difference in report.differences)
        + ("" if changed <= disabled else f"\n{hint}")
    )


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


def _report(
    locks: Records,
    needed: Records,
    recorded: Records,
    plugins: Plugins,
    differences: list[LockDifference],
) -> LockReport:
    """Return what a lock holds, what it does not, and what has changed."""
    compared = [str(locked["plugin"]) for locked in needed]
    changed = {difference.plugin for difference in differences}
    names = {str(locked["plugin"]): {_key(item) for item in locked["components"]} for locked in locks}
    used = {_key(component) for component in recorded}
    return LockReport(
        checked=[name for name in compared if name not in changed],
        skipped=[name for name in names if name not in compared],
        unneeded=[name for name, components in names.items() if not components & used],
        unlocked=sorted({info.dist for info in plugins.entry_points} - names.keys()),
        differences=differences,
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
            if file.name not in UNSIGNED
            and ".." not in file.parts
            and ("__pycache__" not in file.parts or _is_importable(file.name))
        }
    files: dict[str, Path] = {}
    for package in sorted(packages):
        spec = find_spec(package)  # of a name without dots: nothing is imported
        folders = [Path(location) for location in (spec and spec.submodule_search_locations) or ()]
        if spec and spec.origin and not folders:
            files[Path(spec.origin).name] = Path(spec.origin)
        for folder in folders:
            paths = (path for path in folder.rglob("*") if path.is_file())
            names = {path.relative_to(folder): path for path in paths}
            files |= {
                f"{package}/{name.as_posix()}": path for name, path in names.items() if _is_content(name)
            }
    return files


def _is_content(name: Path) -> bool:
    """Return False for what tools leave in a package's folder: caches, hidden files, editors' copies.

    What Python could import is content all the same.
    """
    *folders, file = name.parts
    if any(folder.startswith(".") for folder in folders):
        return False
    is_left = "__pycache__" in folders or file.startswith(".") or file.endswith("~")
    return not is_left or _is_importable(file)


def _is_importable(file: str) -> bool:
    """Return True if a module could have this file; ``x.cpython-311.pyc`` is no module's own name."""
    return any(file.endswith(suffix) and "." not in file[: -len(suffix)] for suffix in all_suffixes())


def _is_editable(distribution: metadata.Distribution) -> bool:
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return bool(origin.get("dir_info", {}).get("editable"))


def _is_unused(locked: Mapping[str, Any], plugins: Plugins) -> bool:
    """Return True if a bundle runs without a plugin: it cannot be used here, and provides no sampler."""
    usable = any(info.dist == locked["plugin"] and plugins.is_enabled(info) for info in plugins.entry_points)
    return not usable and SAMPLER_SETTINGS.keys().isdisjoint(item["slot"] for item in locked["components"])


def _difference(locked: Mapping[str, Any], plugins: Plugins) -> LockDifference | None:
    """Return what differs between a plugin's entry in a lock and what is installed; None if nothing does."""
    plugin = str(locked["plugin"])
    label = " ".join(filter(None, (plugin, locked["version"])))
    try:
        present = next(iter(_locked(plugins, locked["components"])))
    except PluginError as error:
        return LockDifference(plugin, f"{label}: {error}")
    if locked["version"] != present["version"]:
        return LockDifference(plugin, f"{label}: version {present['version']} is installed")
    before, now = locked["files"], present["files"]
    files = {
        "other bytes in": sorted(name for name in before.keys() & now.keys() if before[name] != now[name]),
        "added:": sorted(now.keys() - before.keys()),
        "removed:": sorted(before.keys() - now.keys()),
    }
    if any(files.values()):
        texts = [f"{words} {list_briefly(names, 3)}" for words, names in files.items() if names]
        return LockDifference(plugin, f"{label}: {'; '.join(texts)}", *files.values())
    if present != locked:
        return LockDifference(plugin, f"{label}: its RECORD or its components are others")
    return None
