"""Broken plugins of all sorts, installed at once: commands that do not use them are not affected.

No test waits: the slow one would wait for ever, and is given two seconds by the command that loads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
from dataclasses import dataclass
from janus_modular import ComponentConfig, hookimpl

@dataclass
class TwiceConfig(ComponentConfig):
    '''Options.'''

class Twice:
    '''A component.'''

@hookimpl
def register_adaptors(registry):
    registry.add("NAME", Twice, TwiceConfig)
"""
BROKEN = {  # by name: source, and what doctor says of it
    "missing": ("import timmm\n" + GOOD, "ModuleNotFoundError: No module named 'timmm'"),
    "signature": (GOOD.replace("(registry):", "(registry, width):"), "'width'"),
    "raising": (
        GOOD.replace("registry.add(", "raise OSError('no disk') or registry.add("),
        "OSError: no disk",
    ),
    "misnamed": (GOOD.replace('"NAME"', '"other"'), "declares 'misnamed' in adaptors, but registers other"),
    "leaving": ("import os; os._exit(7)", "its process ended with code 7"),
    "slow": ("import threading; threading.Event().wait()", "it took longer than 2 s"),
}
NEWER = "it is written for version 2 of the plugin API, this is version 1; upgrade with"


def install(site: Path, dist: str, name: str, source: str, api: int = 1) -> None:
    module = dist.replace("-", "_")
    info = site / f"{module}-0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 0.2\n")
    (info / "entry_points.txt").write_text(f"[janus_modular.v{api}.adaptors]\n{name} = {module}\n")
    (site / f"{module}.py").write_text(source.replace("NAME", name))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name, (source, _) in BROKEN.items():
        install(folder, f"acme-{name}", name, source)
    install(folder, "acme-newer", "newer", "raise AssertionError('never import me')", api=2)
    install(folder, "acme-loud", "loud", "print('look at me')\n" + GOOD)
    install(folder, "acme-one", "twice", GOOD)
    install(folder, "acme-two", "twice", GOOD)
    return folder


def janus(site: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    line = [sys.executable, "-m", "janus_modular", *words]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", **environment}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("plugins", "list"),
        pytest.param(("config", "validate", "tiny"), marks=pytest.mark.slow),
        ("plugins", "show", "adaptors:mlp"),
        ("plugins", "show", "acme-one:twice"),
    ],
)
def test_commands_that_need_none_of_them_do_not_notice(site: Path, words: tuple[str, ...]) -> None:
    done = janus(site, *words)
    assert done.returncode == 0, done.stderr
    assert "look at me" not in done.stdout + done.stderr


@pytest.mark.slow
def test_using_a_broken_plugin_raises_its_error(site: Path) -> None:
    done = janus(site, "config", "validate", "tiny", "understanding.adaptor=missing")
    assert done.returncode == 2
    assert "Plugin 'missing' (acme-missing 0.2) failed to load" in done.stderr
    done = janus(site, "config", "validate", "tiny", "understanding.adaptor=twice")
    assert done.returncode == 2
    assert "Write 'acme-one:twice' or 'acme-two:twice'" in done.stderr


def test_doctor_reports_each_broken_plugin(site: Path) -> None:
    off = "janus-modular,acme-slow"
    done = janus(site, "plugins", "doctor", "--json", JANUS_DISABLE_PLUGINS=off)
    said = {report["name"]: report for report in json.loads(done.stdout)}
    assert done.returncode == 1
    for name in BROKEN.keys() - {"slow"}:
        message = BROKEN[name][1]
        assert message in said[name]["message"], name
    assert NEWER in said["newer"]["message"]
    assert (said["loud"]["message"], said["loud"]["output"]) == ("", "look at me")
    assert said["twice"]["message"] == ""
    file = site / "acme_loud.py"
    assert said["loud"]["where"] == f"{file}:{file.read_text().splitlines().index('class Twice:') + 1}"


def test_doctor_gives_up_on_one_that_takes_too_long(site: Path) -> None:
    others = ["janus-modular", "acme-newer", "acme-loud", "twice", *BROKEN.keys() - {"slow"}]
    line = ("plugins", "doctor", "--timeout", "2")
    done = janus(site, *line, JANUS_DISABLE_PLUGINS=",".join(others))
    assert done.returncode == 1
    assert BROKEN["slow"][1] in done.stdout


def test_doctor_says_whom_to_choose_from_and_who_is_loud(site: Path) -> None:
    off = ",".join(["janus-modular", "acme-newer", *(f"acme-{name}" for name in BROKEN)])
    done = janus(site, "plugins", "doctor", JANUS_DISABLE_PLUGINS=off)
    assert done.returncode == 0
    assert "'twice' in adaptors is provided by acme-one 0.2 and acme-two 0.2" in done.stdout
    assert "Plugin 'loud' (acme-loud 0.2) works.\n  its output: look at me" in done.stdout
