"""Tries a plugin in a child process: what it prints, how it crashes and how long it takes stay there."""

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
from janus_modular.plugins.entry_points import EntryPointInfo
from janus_modular.plugins.loading import load, load_file, module_of


@dataclass
class Report:
    """What a plugin turned out to be."""

    message: str = ""  # what is wrong with it; empty where nothing is
    registers: list[str] = field(default_factory=list)
    doc: str = ""
    where: str = ""  # file and line of what it registered
    options: list[dict[str, str]] = field(default_factory=list)  # name, type, default, comment
    output: str = ""  # what it printed while it was loaded
    seconds: float = 0.0
    lacks_extra: bool = False  # nothing is wrong with it, but an extra that it needs is not installed

    @property
    def is_broken(self) -> bool:
        """Whether it is the plugin that has to be mended."""
        return bool(self.message) and not self.lacks_extra

    @property
    def state(self) -> str:
        """Say in a word or three how it came out."""
        return "broken" if self.is_broken else "lacks an extra" if self.lacks_extra else "ok"


def probe(one: EntryPointInfo, *, timeout: float = 300.0) -> Report:
    """Load one plugin in a child process and report; never raises for what is wrong with it."""
    who = f"Plugin '{one.name}' ({one.origin})"
    if refusal := one.refusal():
        return Report(f"{who} is not loaded: {refusal}.")
    return _in_child(asdict(one), who, timeout)


def probe_file(path: Path, *, timeout: float = 300.0) -> tuple[list[EntryPointInfo], Report]:
    """Load a plugin file in a child process; return what it offers, and a report that names ``slot:name``."""
    path = path.expanduser().resolve()
    report = _in_child({"file": path}, f"Plugin file {path}", timeout)
    offers = (one.split(":", 1) for one in report.registers)
    return [
        EntryPointInfo(slot, name, module_of(path), path.name, file=path) for slot, name in offers
    ], report


def _in_child(told: dict[str, Any], who: str, timeout: float) -> Report:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "report.json")
        question = json.dumps({**told, "file": str(told["file"]) if told["file"] else None})
        command = [sys.executable, "-m", "janus_modular.plugins.probe", question, str(answer)]
        try:
            child = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Report(f"{who} failed to load: it took longer than {timeout:g} s.", seconds=timeout)
        output = child.stdout.decode("utf-8", "replace").strip()
        if answer.is_file():
            report = Report(**json.loads(answer.read_text("utf-8")))
        else:
            report = Report(f"{who} failed to load: its process ended with code {child.returncode}.")
    report.output, report.seconds = output, time.monotonic() - start
    return report


def probe_all(
    entry_points: Sequence[EntryPointInfo], *, known: Sequence[EntryPointInfo], timeout: float = 300.0
) -> Iterator[Report]:
    """Probe several, a few at a time; yield the reports in the order of the announcements.

    What a plugin registers and none of ``known`` announces is a fault too: nobody could ask for it.
    """
    announced = {(one.module, one.slot, one.name) for one in known}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        reports = pool.map(lambda one: probe(one, timeout=timeout), entry_points)
        for one, report in zip(entry_points, reports, strict=True):
            for name in report.registers:
                if (one.module, one.slot, name) not in announced:
                    report.message = (
                        f"Plugin '{one.name}' ({one.origin}) registers '{name}' too, unannounced: "
                        f'add {name} = "{one.module}" to its pyproject, under {one.slot}.'
                    )
            yield report


def look_at(one: EntryPointInfo) -> Report:
    """Load a plugin in this process and say what it registers and which options it takes."""
    from janus_modular.plugins.options import options_of

    try:
        if one.file:
            load_file(one.file)
        entries = load(one)
    except MissingExtraError as error:
        return Report(str(error), lacks_extra=True)
    except JanusError as error:
        return Report(str(error))
    entry = entries[one.name]
    return Report(
        registers=sorted(entries),
        doc=(sys.modules[one.module].__doc__ or "").strip(),
        where=where_is(entry.factory),
        options=options_of(entry.config),
    )


def look_at_file(path: Path) -> Report:
    """Load a plugin file in this process and say what it registers, and where."""
    try:
        return Report(registers=[f"{one.slot}:{one.name}" for one in load_file(path)])
    except JanusError as error:
        return Report(str(error))


def where_is(factory: Callable[..., Any]) -> str:
    """Return file and line of a factory's source; nothing where there is no source."""
    try:
        file, (_, line) = inspect.getsourcefile(factory), inspect.getsourcelines(factory)
    except (OSError, TypeError):
        return ""
    return f"{file}:{line}"


def main() -> None:
    """Answer in a file: standard output belongs to whatever the plugin prints."""
    told = json.loads(sys.argv[1])
    told["file"] = Path(told["file"]) if told["file"] else None
    report = look_at(EntryPointInfo(**told)) if "slot" in told else look_at_file(told["file"])
    Path(sys.argv[2]).write_text(json.dumps(asdict(report)), "utf-8")


if __name__ == "__main__":
    main()
