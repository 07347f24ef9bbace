"""Loads a plugin in a child process, so that its output, crashes and hangs do not affect this process."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from janus_modular.errors import JanusError, MissingExtraError
from janus_modular.plugins.catalogue import BUILT_IN
from janus_modular.plugins.entry_points import EntryPointInfo
from janus_modular.plugins.loading import load, load_file, module_of


@dataclass
class Report:
    """The result of loading a plugin."""

    message: str = ""  # the error; "" if it loads
    registers: list[str] = field(default_factory=list)
    doc: str = ""
    where: str = ""  # file and line of the registered component
    options: list[dict[str, str]] = field(default_factory=list)  # name, type, default, comment
    output: str = ""  # printed while it was loaded
    seconds: float = 0.0
    lacks_extra: bool = False  # the error is that an extra is not installed

    @property
    def is_broken(self) -> bool:
        """True if the plugin itself has to be fixed."""
        return bool(self.message) and not self.lacks_extra

    @property
    def state(self) -> str:
        """The result in a few words."""
        return "broken" if self.is_broken else "lacks an extra" if self.lacks_extra else "ok"


def probe(info: EntryPointInfo, *, timeout: float = 300.0) -> Report:
    """Load a plugin in a child process; its errors are in the report and are not raised."""
    label = f"Plugin '{info.name}' ({info.origin})"
    if incompatibility := info.incompatibility():
        return Report(f"{label} is not loaded: {incompatibility}.")
    return _run_child(asdict(info), label, timeout)


def probe_file(path: Path, *, timeout: float = 300.0) -> tuple[list[EntryPointInfo], Report]:
    """Load a plugin file in a child process; return its components, and a report that names ``slot:name``."""
    path = path.expanduser().resolve()
    report = _run_child({"file": path}, f"Plugin file {path}", timeout)
    registered = (component.split(":", 1) for component in report.registers)
    return [
        EntryPointInfo(slot, name, module_of(path), path.name, file=path) for slot, name in registered
    ], report


def _run_child(request: dict[str, Any], label: str, timeout: float) -> Report:
    start = time.monotonic()
    try:
        answer, output, status = _ask_child(request, timeout)
    except subprocess.TimeoutExpired:
        return Report(f"{label} failed to load: it took longer than {timeout:g} s.", seconds=timeout)
    failure = f"{label} failed to load: its process ended with code {status}."
    report = Report(failure) if answer is None else Report(**answer)
    report.output, report.seconds = output, time.monotonic() - start
    return report


def _ask_child(request: Any, timeout: float) -> tuple[Any, str, int]:
    """Run `main` on a request; return its answer (None: it wrote none), its output and its exit status.

    Raises:
        subprocess.TimeoutExpired: the child took longer than ``timeout`` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answer.json")
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "janus_modular.plugins.probe",
                json.dumps(request, default=str),
                str(file),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
        answer = json.loads(file.read_text("utf-8")) if file.is_file() else None
    return answer, child.stdout.decode("utf-8", "replace").strip(), child.returncode


def probe_all(
    entry_points: Sequence[EntryPointInfo], *, known: Sequence[EntryPointInfo], timeout: float = 300.0
) -> Iterator[Report]:
    """Probe plugins, up to four at a time; yield their reports in the order of ``entry_points``.

    Built-in ones share a child process, unless something is wrong with it: then each gets one of its own. A
    plugin that registers a component which none of ``known`` declares is broken: no config could use it.
    """
    declared = {(info.module, info.slot, info.name) for info in known}
    together = probe_together([info for info in entry_points if info.dist == BUILT_IN], timeout=timeout)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        reports = pool.map(lambda info: together.get(info) or probe(info, timeout=timeout), entry_points)
        for info, report in zip(entry_points, reports, strict=True):
            for name in report.registers:
                if (info.module, info.slot, name) not in declared:
                    report.message = (
                        f"Plugin '{info.name}' ({info.origin}) registers '{name}' too, undeclared: "
                        f'add {name} = "{info.module}" to its pyproject, under {info.slot}.'
                    )
            yield report


def probe_together(infos: Sequence[EntryPointInfo], *, timeout: float) -> dict[EntryPointInfo, Report]:
    """Load plugins in one child process; {} if it printed something, crashed or hung, as one of them may."""
    if not infos or any(info.incompatibility() for info in infos):
        return {}
    try:
        reports, output, status = _ask_child([asdict(info) for info in infos], timeout)
    except subprocess.TimeoutExpired:
        return {}
    if reports is None or output or status:
        return {}
    return {info: Report(**report) for info, report in zip(infos, reports, strict=True)}


def inspect_plugin(info: EntryPointInfo) -> Report:
    """Load a plugin in this process; report what it registers and the options of its component."""
    from janus_modular.plugins.options import options_of

    try:
        if info.file:
            load_file(info.file)
        entries = load(info)
    except MissingExtraError as error:
        return Report(str(error), lacks_extra=True)
    except JanusError as error:
        return Report(str(error))
    entry = entries[info.name]
    return Report(
        registers=sorted(entries),
        doc=(sys.modules[info.module].__doc__ or "").strip(),
        where=source_location(entry.factory),
        options=options_of(entry.config),
    )


def inspect_file(path: Path) -> Report:
    """Load a plugin file in this process; report what it registers."""
    try:
        return Report(registers=[f"{info.slot}:{info.name}" for info in load_file(path)])
    except JanusError as error:
        return Report(str(error))


def source_location(factory: Callable[..., Any]) -> str:
    """Return file and line of a factory's source; "" if there is no source."""
    try:
        file, (_, line) = inspect.getsourcefile(factory), inspect.getsourcelines(factory)
    except (OSError, TypeError):
        return ""
    return f"{file}:{line}"


def main() -> None:
    """Write the report to a file: standard output belongs to the plugin."""
    request = json.loads(sys.argv[1])
    if isinstance(request, list):
        reports = [asdict(_timed(EntryPointInfo(**each))) for each in request]
        Path(sys.argv[2]).write_text(json.dumps(reports), "utf-8")
        return
    request["file"] = Path(request["file"]) if request["file"] else None
    report = inspect_plugin(EntryPointInfo(**request)) if "slot" in request else inspect_file(request["file"])
    Path(sys.argv[2]).write_text(json.dumps(asdict(report)), "utf-8")


def _timed(info: EntryPointInfo) -> Report:
    start = time.monotonic()
    report = inspect_plugin(info)
    report.seconds = time.monotonic() - start
    return report


if __name__ == "__main__":
    main()
