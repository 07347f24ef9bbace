"""The catalogue of available components, by slot and name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import Any

from janus_modular.errors import JanusError, PluginError
from janus_modular.interfaces import ComponentSpec
from janus_modular.plugins.entry_points import EntryPointInfo, installed
from janus_modular.plugins.loading import load, load_file
from janus_modular.registry import MODEL_SLOTS, SAMPLER_SETTINGS, SLOTS, Entry, a_component, slot_label
from janus_modular.renamed import explain_renamed
from janus_modular.suggest import did_you_mean

BUILT_IN = "janus-modular"
"""The distribution of the built-in components."""

FILES_VARIABLE = "JANUS_PLUGIN_FILES"
"""The environment variable that names plugin files for every command."""

FILE_HINT = f"--plugin FILE.py, or for every command {FILES_VARIABLE}=FILE.py"


@explain_renamed
class Plugins:
    """The declared components: lists and finds them by metadata, and loads a component when it is used."""

    def __init__(
        self,
        entry_points: Iterable[EntryPointInfo] = (),
        *,
        disabled: Iterable[str] = (),
        strict: bool = False,
    ) -> None:
        """Start from entry points, some ``disabled`` by name; ``strict`` makes a broken plugin an error."""
        self.entry_points = list(entry_points)
        self.disabled = tuple(disabled)
        self.strict = strict
        self._loaded: dict[EntryPointInfo, dict[str, Entry[Any]]] = {}
        self._failed: dict[EntryPointInfo, JanusError] = {}
        self._recorded: dict[tuple[str, str], Mapping[str, str | None]] = {}  # by slot and name

    def add_file(self, path: str | Path) -> list[EntryPointInfo]:
        """Load a local plugin file at once; return the components that it provides.

        Raises:
            PluginError: the file cannot be loaded.
        """
        if any(info.file == Path(path).expanduser().resolve() for info in self.entry_points):
            return []
        provided = load_file(Path(path))
        self.entry_points += provided
        return provided

    def is_enabled(self, entry_point: EntryPointInfo) -> bool:
        """Return True unless JANUS_DISABLE_PLUGINS names it."""
        return not any(entry_point.matches(word) for word in self.disabled)

    def usable(self, slot: str) -> list[EntryPointInfo]:
        """Return the components of a slot that are enabled and compatible."""
        return [
            info
            for info in self.entry_points
            if info.slot == slot and self.is_enabled(info) and not info.incompatibility()
        ]

    def unusable(self, slot: str) -> list[str]:
        """Return, for each component of a slot that is disabled or incompatible, why it cannot be used."""
        of_slot = [info for info in self.entry_points if info.slot == slot]
        return [
            self._why_unusable(info, info.name)
            for info in of_slot
            if not self.is_enabled(info) or info.incompatibility()
        ]

    def names(self, slot: str) -> list[str]:
        """Return the names in a slot, sorted; ``dist:name`` where several distributions share one."""
        usable = self.usable(slot)
        count = Counter(info.name for info in usable)
        return sorted(info.name if count[info.name] == 1 else f"{info.dist}:{info.name}" for info in usable)

    def shared_built_ins(self) -> set[str]:
        """Return the names of built-in components that another distribution provides in the same slot."""
        prefix = f"{BUILT_IN}:"
        names = [name for slot in SLOTS for name in self.names(slot)]
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    def share_slot(self, first: str, second: str) -> bool:
        """Return True if components of both names fill the same slot, by metadata alone."""
        slots, second_slots = (
            {info.slot for info in self.entry_points if name in (info.name, f"{info.dist}:{info.name}")}
            for name in (first, second)
        )
        return bool(slots & second_slots)

    def find(self, slot: str, name: str) -> EntryPointInfo:
        """Return the component ``name`` (or ``dist:name``) of a slot, without importing it.

        Raises:
            PluginError: the name is unknown, ambiguous, disabled or incompatible.
        """
        if slot not in SLOTS:
            raise PluginError(
                f"there is no slot '{slot}'. {did_you_mean(slot, SLOTS)}\nSlots: {', '.join(SLOTS)}"
            )
        dist, _, bare = name.rpartition(":")
        candidates = [
            info
            for info in self.entry_points
            if info.slot == slot and info.name == bare and (not dist or info.dist == dist)
        ]
        enabled = [info for info in candidates if self.is_enabled(info)]
        if usable := [info for info in enabled if not info.incompatibility()]:
            return usable[0] if len(usable) == 1 else self._choose(usable, slot, bare, qualified=bool(dist))
        if candidates:
            raise PluginError(f"{self._why_unusable((enabled or candidates)[0], name)}.")
        raise PluginError(self._unknown(slot, name))

    def _choose(
        self, usable: list[EntryPointInfo], slot: str, name: str, *, qualified: bool
    ) -> EntryPointInfo:
        """Return the component that the checkpoint recorded, of several with the same name.

        Raises:
            PluginError: none was recorded; lists the qualified names.
        """
        record = self._recorded.get((slot, name), {})
        origin = record.get("dist") or record.get("file")
        recorded = next((info for info in usable if not qualified and info.dist == origin), None)
        if recorded:
            return recorded
        third_party = next((info for info in reversed(usable) if info.dist != BUILT_IN), usable[-1])
        raise PluginError(
            f"{len(usable)} plugins provide the {slot_label(slot)} '{name}': "
            f"{' and '.join(info.origin for info in usable)}.\n"
            f"Write {' or '.join(repr(f'{info.dist}:{name}') for info in usable)}, or disable one: "
            f"JANUS_DISABLE_PLUGINS={third_party.dist}:{name}"
        )

    def entry(self, slot: str, name: str) -> Entry[Any]:
        """Load the component ``name`` of a slot: only its module is imported, only its hook called.

        Raises:
            PluginError: the name is unknown, ambiguous, disabled or incompatible, or its plugin is broken.
            MissingExtraError: the component needs a package that one of our extras installs.
        """
        if self.strict:
            self.check_all()
        info = self.find(slot, name)
        return self._load(info)[info.name]

    def check_all(self) -> None:
        """Load every component that is enabled.

        Raises:
            PluginError: lists every broken plugin.
        """
        errors = []
        for info in filter(self.is_enabled, self.entry_points):
            try:
                self._load(info)
            except JanusError as error:
                errors.append(str(error))
        if errors:
            raise PluginError(
                "\n".join([*errors, "JANUS_PLUGINS_STRICT is set: any broken plugin is an error."])
            )

    def required(self, specs: Iterable[ComponentSpec]) -> list[dict[str, str | None]]:
        """Return the origin of each component, as checkpoints record it: slot, name, dist, version, file."""
        records: dict[EntryPointInfo, dict[str, str | None]] = {}
        for spec in specs:
            info = self.find(spec.slot, spec.name)
            file = info.file.name if info.file else None
            records[info] = {
                "slot": info.slot,
                "name": info.name,
                "dist": None if file else info.dist,
                "version": info.version or None,
                "file": file,
            }
        return list(records.values())

    def as_recorded(self, records: Iterable[Mapping[str, str | None]]) -> Plugins:
        """Return these plugins, with ambiguous names resolved as a checkpoint recorded them (`required`).

        Errors about unknown names then say how to install the recorded plugin.
        """
        view = copy(self)  # shares the entry points, and the plugins that are loaded
        view._recorded = self._recorded | {
            (record["slot"] or "", record["name"] or ""): record for record in records
        }
        return view

    def full_name(self, slot: str, name: str) -> str:
        """Return an unambiguous name of a component: ``dist:name`` where several share the name."""
        info = self.find(slot, name)
        return info.name if info.name in self.names(slot) else f"{info.dist}:{info.name}"

    def check_required(self, records: Iterable[Mapping[str, str | None]]) -> None:
        """Check that the components that a checkpoint recorded (`required`) are available.

        Samplers are not checked: ``chat`` needs no image sampler. `entry` raises where one is missing.

        Raises:
            PluginError: lists every component that is not installed, disabled, or written for another version
                of the plugin API, each with the plugin that provides it.
        """
        errors = []
        for record in records:
            slot, name = record["slot"] or "", record["name"] or ""
            if slot not in SLOTS:
                hint = did_you_mean(slot, SLOTS)
                errors.append(f"'{name}' is recorded in '{slot}', which is no slot. {hint}")
            elif slot not in SAMPLER_SETTINGS and not any(info.name == name for info in self.usable(slot)):
                errors.append(self._unusable(record))
        if errors:
            raise PluginError("a plugin that the model needs cannot be used.\n" + "\n".join(errors))

    def _unusable(self, record: Mapping[str, str | None]) -> str:
        """Return why no usable component has the slot and the name of a record, with a hint."""
        slot, name, dist = record["slot"] or "", record["name"] or "", record.get("dist")
        label = f"the {slot_label(slot)} '{name}'"
        declared = [info for info in self.entry_points if (info.slot, info.name) == (slot, name)]
        if declared:
            info = next((info for info in declared if info.dist == dist), declared[0])
            recorded = f"{dist}=={record.get('version')}"
            is_other = info.dist == dist and record.get("version") not in (None, info.version)
            hint = f", or install what the model was saved with: pip install {recorded}" if is_other else ""
            return f"{self._why_unusable(info, name)}{hint if info.incompatibility() else ''}"
        if of_dist := next((info for info in self.entry_points if dist and info.dist == dist), None):
            return f"{label} is not in {of_dist.origin}, which is installed: {_install_hint(record)}"
        return f"{label} is not installed: {_install_hint(record)}"

    def _why_unusable(self, info: EntryPointInfo, name: str) -> str:
        """Return that a declared component is disabled, or why it is incompatible; ``name`` as written."""
        label = f"the {slot_label(info.slot)} '{name}' of {info.origin}"
        if not self.is_enabled(info):
            words = ",".join(self.disabled)
            return f"{label} is disabled by JANUS_DISABLE_PLUGINS={words}; to use it, unset the variable"
        return f"{label} cannot be loaded: {info.incompatibility()}"

    def _load(self, info: EntryPointInfo) -> dict[str, Entry[Any]]:
        if info not in self._loaded:
            try:
                self._loaded[info] = load(info)
            except JanusError as error:
                self._failed[info] = error
                raise
        return self._loaded[info]

    def _unknown(self, slot: str, name: str) -> str:
        """Return the message of an unknown name: similar and registered names, and what failed to load."""
        names, bare = self.names(slot), name.rpartition(":")[2]
        record = self._recorded.get((slot, bare))
        elsewhere = [
            a_component(each) for each in SLOTS if any(info.name == bare for info in self.usable(each))
        ]
        similar = self._builder_of(slot, name) or did_you_mean(name, names)
        lines = [
            f"no {slot_label(slot)} is called '{name}'.",
            f"The model was saved where it was installed: {_install_hint(record)}" if record else "",
            f"'{bare}' is registered as {' and as '.join(elsewhere)}." if elsewhere else "",
            similar or ("" if record or elsewhere else f"A component of a local file needs {FILE_HINT}"),
            f"Registered: {', '.join(names) or 'none'}",
            *(str(error) for info, error in self._failed.items() if info.slot == slot),
            *(
                f"{info.origin} declares '{info.name}' as {a_component(info.slot)}: {info.incompatibility()}"
                for info in self.entry_points
                if info.name == bare and info.slot not in SLOTS
            ),
            "See them all with: janus-modular plugins list",
        ]
        return "\n".join(filter(None, lines))

    def _builder_of(self, slot: str, family: str) -> str:
        """Return how to write a model type that a component of the slot builds; "" if none is known to.

        An unknown name imports no third party's code: only built-in components and loaded ones are asked.
        """
        of_slot = [info for info in self.entry_points if info.slot == slot and self.is_enabled(info)]
        safe = [info for info in of_slot if info.dist == BUILT_IN or info in self._loaded]
        for info in safe if slot in MODEL_SLOTS else ():
            with suppress(JanusError):  # listed as failed
                if family in self._load(info)[info.name].families:
                    return f"{info.name} builds it: {{name: {info.name}, config: {{model_type: {family}}}}}"
        return ""


def _install_hint(record: Mapping[str, str | None]) -> str:
    """Return the command that installs a recorded component."""
    if record.get("file"):
        return FILE_HINT.replace("FILE.py", str(record["file"]))
    if not record.get("dist"):
        return "its record does not name the plugin"
    version = record.get("version")
    return f"pip install {record['dist']}" + (f"=={version}" if version else "")


_default: Plugins | None = None


def default_plugins() -> Plugins:
    """Return the installed plugins as the environment variables configure them; read once."""
    global _default
    if _default is None:
        plugins = without_files()
        for file in files_of_environment():
            try:
                plugins.add_file(file)
            except PluginError as error:
                error.add_note(f"The file is named in {FILES_VARIABLE}.")
                raise
        _default = plugins
    return _default


def without_files() -> Plugins:
    """Return the installed plugins as the environment variables configure them, without plugin files."""
    words = os.environ.get("JANUS_DISABLE_PLUGINS", "").split(",")
    return Plugins(
        installed(),
        disabled=[word.strip() for word in words if word.strip()],
        strict=os.environ.get("JANUS_PLUGINS_STRICT", "") not in ("", "0"),
    )


def files_of_environment() -> list[Path]:
    """Return the plugin files that JANUS_PLUGIN_FILES names."""
    return [Path(file) for file in os.environ.get(FILES_VARIABLE, "").split(os.pathsep) if file]


def set_default_plugins(plugins: Plugins | None) -> None:
    """Set the default plugins (for tests); None: read the environment again."""
    global _default
    _default = plugins
