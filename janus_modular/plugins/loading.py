"""Imports a plugin and collects what it registers; any failure becomes an error that names the plugin."""

from __future__ import annotations

import hashlib
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any

import pluggy

from janus_modular.errors import PluginError, missing_extra
from janus_modular.plugins.entry_points import EntryPointInfo
from janus_modular.registry import PROJECT, SLOTS, Entry, Hooks, Registry
from janus_modular.suggest import did_you_mean

FILE_MODULE = "janus_plugin_file_"
"""Prefix of the module names of local plugin files."""


def load(entry_point: EntryPointInfo) -> dict[str, Entry[Any]]:
    """Import a declared plugin and return what it registers in its slot, by name.

    Raises:
        PluginError: the plugin cannot be imported, its hook is invalid, or registers another name.
        MissingExtraError: the plugin needs a package that one of our extras installs.
    """
    label = f"Plugin '{entry_point.name}' ({entry_point.origin})"
    if incompatibility := entry_point.incompatibility():
        raise PluginError(f"{label} is not loaded: {incompatibility}.")
    try:
        # the file of a local plugin was loaded by `load_file`
        module = sys.modules[entry_point.module] if entry_point.file else import_module(entry_point.module)
        entries = registered(module, entry_point.slot, entry_point.origin)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(error, label)):
            raise missing from error
        raise PluginError(f"{label} failed to load: {describe(error)}") from error
    if entry_point.name not in entries:
        names = ", ".join(sorted(entries)) or "nothing"
        raise PluginError(
            f"{label} declares '{entry_point.name}' in {entry_point.slot}, but registers {names}: make the "
            f"entry point in its pyproject.toml and registry.add(...) in {entry_point.module} agree."
        )
    return entries


def registered(module: ModuleType, slot: str, plugin: str) -> dict[str, Entry[Any]]:
    """Call a module's hook of ``slot``, and no other, and return what it registers.

    Raises:
        PluginError: the module implements a hook that does not exist, or a hook with other arguments.
    """
    manager = pluggy.PluginManager(PROJECT)  # one for each plugin, so that its errors do not affect others
    manager.add_hookspecs(Hooks)
    try:
        manager.register(module, name=plugin)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = [f"register_{slot}" for slot in SLOTS]
        unknown = [hook.name for hook in manager.get_hookcallers(module) or () if not hook.has_spec()]
        hint = did_you_mean(unknown[0], known) if unknown else "A hook takes one argument: registry."
        raise PluginError(f"{' '.join(str(error).split())}. {hint}".rstrip()) from error
    registry: Registry[Any] = Registry(slot, plugin=plugin)
    getattr(manager.hook, f"register_{slot}")(registry=registry)
    return registry.entries


def load_file(path: Path) -> list[EntryPointInfo]:
    """Import a plugin file that the user named; return the components that its hooks register.

    Raises:
        PluginError: there is no such file, it cannot be imported, or it registers nothing.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise PluginError(f"there is no plugin file {path}: expected the path of a Python file.")
    name = module_of(path)
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} is no Python file: expected a file that ends in .py.")
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        provided = [
            EntryPointInfo(slot, entry, name, dist=path.name, file=path)
            for slot in SLOTS
            for entry in registered(module, slot, path.name)
        ]
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, ModuleNotFoundError) and (
            missing := missing_extra(error, f"Plugin file {path}")
        ):
            raise missing from error
        raise PluginError(
            f"Plugin file {path}{_line(path, error)} failed to load: {describe(error)}"
        ) from error
    if not provided:
        raise PluginError(
            f"Plugin file {path} registers nothing: end it with a function marked @hookimpl that calls "
            f"registry.add(name, class, config), one of {', '.join(f'register_{slot}' for slot in SLOTS)}."
        )
    return provided


def module_of(path: Path) -> str:
    """Return a unique module name for a plugin file: dataclasses look up their module in sys.modules."""
    return f"{FILE_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _line(path: Path, error: BaseException) -> str:
    """Return the line of a file at which an error arose, `` (line 3)``; "" if it arose elsewhere."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return f" (line {lines[-1]})" if lines else ""


def describe(error: BaseException) -> str:
    """Return the text of an error, with its type unless it is a PluginError."""
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
