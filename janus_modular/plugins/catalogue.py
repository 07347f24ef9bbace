"""Every component that can be had, by slot and name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from janus_modular.errors import JanusError, PluginError
from janus_modular.interfaces import ComponentSpec
from janus_modular.plugins.entry_points import EntryPointInfo, installed
from janus_modular.plugins.loading import load, load_file
from janus_modular.registry import SAMPLER_SETTINGS, SLOTS, Entry, a_component, slot_label
from janus_modular.suggest import did_you_mean

BUILT_IN = "janus-modular"
"""The distribution of the components that come with the framework."""


class Plugins:
    """Knows what is announced, and loads what is asked for."""

    def __init__(
        self,
        entry_points: Iterable[EntryPointInfo] = (),
        *,
        disabled: Iterable[str] = (),
        strict: bool = False,
    ) -> None:
        """Start from announcements; ``disabled`` words switch off, ``strict`` makes any fault an error."""
        self.entry_points = list(entry_points)
        self.disabled = tuple(disabled)
        self.strict = strict
        self._loaded: dict[EntryPointInfo, dict[str, Entry[Any]]] = {}
        self._failed: dict[EntryPointInfo, JanusError] = {}
        self._recorded: dict[tuple[str, str], Mapping[str, str | None]] = {}  # by slot and name

    def add_file(self, path: str | Path) -> list[EntryPointInfo]:
        """Load a local plugin file; return what it offers.

        Raises:
            PluginError: it does not load. The user named it, so this is never put off.
        """
        if any(one.file == Path(path).expanduser().resolve() for one in self.entry_points):
            return []
        found = load_file(Path(path))
        self.entry_points += found
        return found

    def is_enabled(self, entry_point: EntryPointInfo) -> bool:
        """Say whether nobody switched it off."""
        return not any(entry_point.matches(word) for word in self.disabled)

    def usable(self, slot: str) -> list[EntryPointInfo]:
        """Return what can be asked for in a slot."""
        return [
            one
            for one in self.entry_points
            if one.slot == slot and self.is_enabled(one) and not one.refusal()
        ]

    def names(self, slot: str) -> list[str]:
        """Return the names in a slot, sorted; ``dist:name`` where several distributions share one."""
        offers = self.usable(slot)
        plain = [one.name for one in offers]
        return sorted(one.name if plain.count(one.name) == 1 else f"{one.dist}:{one.name}" for one in offers)

    def shared_built_ins(self) -> set[str]:
        """Return the names of built-in components that another distribution offers in the same slot."""
        ours = f"{BUILT_IN}:"
        names = [name for slot in SLOTS for name in self.names(slot)]
        return {name.removeprefix(ours) for name in names if name.startswith(ours)}

    def share_slot(self, name: str, other: str) -> bool:
        """Return True if two names are those of components of the same slot, by metadata alone."""
        slots, others = (
            {one.slot for one in self.entry_points if word in (one.name, f"{one.dist}:{one.name}")}
            for word in (name, other)
        )
        return bool(slots & others)

    def find(self, slot: str, name: str) -> EntryPointInfo:
        """Return what ``name`` (or ``dist:name``) means in a slot, without importing it.

        Raises:
            PluginError: nothing is called so, or several are.
        """
        if slot not in SLOTS:
            raise PluginError(
                f"there is no slot '{slot}'. {did_you_mean(slot, SLOTS)}\nSlots: {', '.join(SLOTS)}"
            )
        dist, _, bare = name.rpartition(":")
        called = [
            one
            for one in self.entry_points
            if one.slot == slot and one.name == bare and (not dist or one.dist == dist)
        ]
        on = [one for one in called if self.is_enabled(one)]
        if fits := [one for one in on if not one.refusal()]:
            if len(fits) == 1:
                return fits[0]
            then = self._recorded.get((slot, bare), {})
            origin = then.get("dist") or then.get("file")
            if meant := [one for one in fits if not dist and one.dist == origin]:
                return meant[0]
            stranger = next((one for one in reversed(fits) if one.dist != BUILT_IN), fits[-1])
            raise PluginError(
                f"{len(fits)} plugins offer the {slot_label(slot)} '{bare}': "
                f"{' and '.join(one.origin for one in fits)}.\n"
                f"Write {' or '.join(repr(f'{one.dist}:{bare}') for one in fits)}, or switch one off: "
                f"JANUS_DISABLE_PLUGINS={stranger.dist}:{bare}"
            )
        if on:
            raise PluginError(
                f"the {slot_label(slot)} '{name}' of {on[0].origin} is refused: {on[0].refusal()}."
            )
        if called:
            raise PluginError(
                f"the {slot_label(slot)} '{name}' of {called[0].origin} is switched off by "
                f"JANUS_DISABLE_PLUGINS={','.join(self.disabled)}."
            )
        raise PluginError(self._unknown(slot, name))

    def entry(self, slot: str, name: str) -> Entry[Any]:
        """Load what ``name`` means in a slot: only its module, only its hook.

        Raises:
            PluginError: it is unknown, ambiguous, switched off or broken.
            MissingExtraError: it needs a package that one of our extras installs.
        """
        if self.strict:
            self.check_all()
        wanted = self.find(slot, name)
        return self._load(wanted)[wanted.name]

    def check_all(self) -> None:
        """Load everything that is not switched off.

        Raises:
            PluginError: lists every plugin that is broken.
        """
        errors = []
        for one in filter(self.is_enabled, self.entry_points):
            try:
                self._load(one)
            except JanusError as error:
                errors.append(str(error))
        if errors:
            raise PluginError(
                "\n".join([*errors, "JANUS_PLUGINS_STRICT is set: any broken plugin is an error."])
            )

    def required(self, parts: Iterable[ComponentSpec]) -> list[dict[str, str | None]]:
        """Say where each part comes from, as a checkpoint records it: slot, name, dist, version, file."""
        found: dict[EntryPointInfo, dict[str, str | None]] = {}
        for part in parts:
            one = self.find(part.slot, part.name)
            file = one.file.name if one.file else None
            found[one] = {
                "slot": one.slot,
                "name": one.name,
                "dist": None if file else one.dist,
                "version": one.version or None,
                "file": file,
            }
        return list(found.values())

    def as_recorded(self, needed: Iterable[Mapping[str, str | None]]) -> Plugins:
        """Return these plugins, but a name that several share here means what `required` recorded.

        One that is not here is an error that says who offered it then.
        """
        view = copy(self)  # of the same announcements, and of what is loaded already
        view._recorded = self._recorded | {(one["slot"] or "", one["name"] or ""): one for one in needed}
        return view

    def full_name(self, slot: str, name: str) -> str:
        """Return a name that means the same component to everybody: ``dist:name`` where several share it."""
        one = self.find(slot, name)
        return one.name if one.name in self.names(slot) else f"{one.dist}:{one.name}"

    def check_required(self, needed: Iterable[Mapping[str, str | None]]) -> None:
        """Check that the parts that `required` recorded can be had here.

        Samplers are not looked for: ``chat`` needs no image sampler. `entry` says which sampler is missing.

        Raises:
            PluginError: lists every component that cannot, with the plugin that offers it.
        """
        errors = []
        for one in needed:
            slot, name = one["slot"] or "", one["name"] or ""
            if slot not in SLOTS:
                errors.append(
                    f"'{name}' is recorded in '{slot}', which is no slot. {did_you_mean(slot, SLOTS)}"
                )
            elif slot not in SAMPLER_SETTINGS and not any(here.name == name for here in self.usable(slot)):
                errors.append(f"the {slot_label(slot)} '{name}' is not here: {_cure(one)}")
        if errors:
            raise PluginError("a plugin is missing.\n" + "\n".join(errors))

    def _load(self, one: EntryPointInfo) -> dict[str, Entry[Any]]:
        if one not in self._loaded:
            try:
                self._loaded[one] = load(one)
            except JanusError as error:
                self._failed[one] = error
                raise
        return self._loaded[one]

    def _unknown(self, slot: str, name: str) -> str:
        """Answer four questions: which slot, what was written, what could have been, what next."""
        names = self.names(slot)
        then = self._recorded.get((slot, name.rpartition(":")[2]))
        lines = [
            f"no {slot_label(slot)} is called '{name}'.",
            f"The model was saved where it was installed: {_cure(then)}" if then else "",
            did_you_mean(name, names),
            f"Registered: {', '.join(names) or 'none'}",
            *(str(error) for one, error in self._failed.items() if one.slot == slot),
            *(
                f"{one.origin} announces '{one.name}' as {a_component(one.slot)}: {one.refusal()}"
                for one in self.entry_points
                if one.name == name.rpartition(":")[2] and one.slot not in SLOTS
            ),
            "See them all with: janus-modular plugins list",
        ]
        return "\n".join(filter(None, lines))


def _cure(recorded: Mapping[str, str | None]) -> str:
    """Write what brings a component here that `Plugins.required` recorded."""
    if recorded.get("file"):
        return f"--plugin {recorded['file']}"
    if not recorded.get("dist"):
        return "its record does not say by what"
    version = recorded.get("version")
    return f"pip install {recorded['dist']}" + (f"=={version}" if version else "")


_default: Plugins | None = None


def default_plugins() -> Plugins:
    """Return what is installed here, as the environment variables have it; read once."""
    global _default
    if _default is None:
        _default = without_files()
        for file in files_of_environment():
            _default.add_file(file)
    return _default


def without_files() -> Plugins:
    """Return what is installed here, as the environment variables have it, but load no plugin file."""
    words = os.environ.get("JANUS_DISABLE_PLUGINS", "").split(",")
    return Plugins(
        installed(),
        disabled=[word.strip() for word in words if word.strip()],
        strict=os.environ.get("JANUS_PLUGINS_STRICT", "") not in ("", "0"),
    )


def files_of_environment() -> list[Path]:
    """Return the plugin files that JANUS_PLUGIN_FILES names."""
    return [Path(file) for file in os.environ.get("JANUS_PLUGIN_FILES", "").split(os.pathsep) if file]


def set_default_plugins(plugins: Plugins | None) -> None:
    """Use these plugins from now on (tests do); None reads the environment again."""
    global _default
    _default = plugins
