"""Locked plugins: a model opens with the locked bytes; changed plugins are errors before the import."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from janus_modular import PluginError
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.plugins import Plugins, installed, set_default_plugins
from janus_modular.plugins.lock import LOCK, check_lock, compare_lock, write_lock

SOURCE = """
from janus_modular import hookimpl
from janus_plugins.adaptors.mlp import MlpAdaptor, MlpConfig

@hookimpl
def register_adaptors(registry):
    registry.add("acme", MlpAdaptor, MlpConfig)
"""


def install(site: Path, version: str = "0.2") -> None:
    """Put a distribution with its RECORD into a folder, as pip does."""
    for old in site.glob("*.dist-info/*"):
        old.unlink()
    info = site / f"acme_adaptors-{version}.dist-info"
    for folder in (site / "acme_adaptors", info):
        folder.mkdir(exist_ok=True)
    (site / "acme_adaptors/__init__.py").write_text("")
    (site / "acme_adaptors/mlp.py").write_text(SOURCE)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-adaptors\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[janus_modular.v1.adaptors]\nacme = acme_adaptors.mlp\n")
    files = sorted(path for folder in (site / "acme_adaptors", info) for path in folder.glob("*.*"))
    with (info / "RECORD").open("w", newline="") as record:
        for path in files:
            binary = hashlib.sha256(path.read_bytes()).digest()
            digest = base64.urlsafe_b64encode(binary).rstrip(b"=").decode()
            name = path.relative_to(site).as_posix()
            csv.writer(record).writerow([name, f"sha256={digest}", path.stat().st_size])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    install(folder)
    yield folder
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith("acme_adaptors")]:
        del sys.modules[name]


@pytest.fixture
def rescan(plugins: Plugins, site: Path) -> Callable[[], Plugins]:
    """Return a function that looks anew for what is installed, as a new process does."""

    def look() -> Plugins:
        forget()
        ours = installed(metadata.distributions(path=[str(site)]))
        everything = Plugins([*plugins.entry_points, *ours])
        set_default_plugins(everything)
        return everything

    return look


@pytest.fixture
def model(rescan: Callable[[], Plugins], tmp_path: Path) -> Path:
    everything = rescan()
    raw = load("tiny", ["understanding.adaptor=acme"], everything)
    assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, everything), plugins=everything)
    save(assembly, tmp_path / "model", plugins=everything)
    return tmp_path / "model"


def test_a_model_opens_with_what_was_locked(model: Path, rescan: Callable[[], Plugins]) -> None:
    lock = json.loads(write_lock(model, rescan()).read_text())
    entries = {entry["plugin"]: entry for entry in lock["plugins"]}
    assert set(entries) == {"acme-adaptors", "janus-modular"}
    record = metadata.distribution("acme-adaptors").read_text("RECORD") or ""
    assert entries["acme-adaptors"]["record_sha256"] == hashlib.sha256(record.encode()).hexdigest()
    assert "acme_adaptors/mlp.py" in entries["acme-adaptors"]["files"]
    ModelAssembly.from_checkpoint(model, plugins=rescan())
    assert "acme_adaptors.mlp" in sys.modules


def other_bytes(site: Path) -> None:
    (site / "acme_adaptors/mlp.py").write_text(SOURCE + "raise SystemExit('read')\n")


def another_file(site: Path) -> None:
    (site / "acme_adaptors/__init__.py").unlink()


def another_version(site: Path) -> None:
    install(site, "0.3")


def nothing(site: Path) -> None:
    for file in site.glob("*.dist-info/*"):
        file.unlink()


def another_record(site: Path) -> None:
    with next(site.glob("*.dist-info/RECORD")).open("a") as record:
        record.write("acme_adaptors/more.py,sha256=abc,3\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_bytes, r"acme-adaptors 0\.2: other bytes in acme_adaptors/mlp\.py"),
        (another_file, r"0\.2: removed: acme_adaptors/__init__\.py\n"),
        (another_version, r"acme-adaptors 0\.2: version 0\.3 is installed"),
        (nothing, r"acme-adaptors 0\.2: no adaptor is called 'acme-adaptors:acme'"),
        (another_record, r"acme-adaptors 0\.2: its RECORD or its components are others"),
    ],
)
def test_a_changed_plugin_is_refused_unread(
    model: Path, site: Path, rescan: Callable[[], Plugins], change: Callable[[Path], None], words: str
) -> None:
    write_lock(model, rescan())
    change(site)
    for action in (
        lambda: ModelAssembly.from_checkpoint(model, plugins=rescan()),
        lambda: check_lock(model, rescan()),
    ):
        with pytest.raises(PluginError, match=words) as refused:
            action()
        assert "none was imported" in str(refused.value)
        assert f"janus-modular plugins lock {model}" in str(refused.value)
        assert "acme_adaptors.mlp" not in sys.modules
    refused_info = CliRunner().invoke(app, ["info", str(model)])
    assert (refused_info.exit_code, "none was imported" in refused_info.stderr) == (2, True)


def test_plugin_files_are_locked_too(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)

    def with_file() -> Plugins:
        everything = Plugins(plugins.entry_points)
        everything.add_file(file)
        return everything

    (tmp_path / "config.json").write_text(
        json.dumps({"plugins": [{"slot": "adaptors", "name": "acme", "dist": None, "file": "mine.py"}]})
    )
    write_lock(tmp_path, with_file())
    assert compare_lock(tmp_path, with_file()).checked == ["mine.py"]
    file.write_text(SOURCE + "\n")
    with pytest.raises(PluginError, match=r"mine\.py: other bytes in mine\.py"):
        check_lock(tmp_path, with_file())


def test_what_only_the_lock_or_only_the_environment_has_is_reported(
    model: Path, tmp_path: Path, rescan: Callable[[], Plugins]
) -> None:
    path = write_lock(model, rescan())
    lock = json.loads(path.read_text())
    [acme] = [entry for entry in lock["plugins"] if entry["plugin"] == "acme-adaptors"]
    (tmp_path / "mine.py").write_text(SOURCE.replace('"acme"', '"mine"'))
    everything = rescan()
    everything.add_file(tmp_path / "mine.py")
    assert compare_lock(model, everything).unlocked == ["mine.py"]

    config = json.loads((model / "config.json").read_text())
    config["plugins"] = [item for item in config["plugins"] if item["dist"] != "acme-adaptors"]
    (model / "config.json").write_text(json.dumps(config))
    report = compare_lock(model, everything)
    assert (report.unneeded, acme["components"][0]["name"]) == (["acme-adaptors"], "acme")
    set_default_plugins(everything)
    shown = CliRunner().invoke(app, ["plugins", "verify", str(model)]).stdout.splitlines()
    assert shown == [
        "as locked: acme-adaptors, janus-modular",
        "locked, though the model uses none of its components: acme-adaptors",
        "installed, not locked: the model uses none of its components: mine.py",
    ]


def test_a_recorded_component_that_is_not_locked_is_refused(
    model: Path, rescan: Callable[[], Plugins]
) -> None:
    path = write_lock(model, rescan())
    lock = json.loads(path.read_text())
    lock["plugins"] = [entry for entry in lock["plugins"] if entry["plugin"] != "acme-adaptors"]
    path.write_text(json.dumps(lock))
    with pytest.raises(PluginError, match="the adaptor 'acme' is recorded, but not locked"):
        ModelAssembly.from_checkpoint(model, plugins=rescan())
    assert "acme_adaptors.mlp" not in sys.modules


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 2}', '{"format": 1, "api": 1, "plugins": [{}]}', '{"format": 1, "plugins": 5}'],
)
def test_a_damaged_lock_is_an_error_that_names_it(
    model: Path, rescan: Callable[[], Plugins], content: str
) -> None:
    (model / LOCK).write_text(content)
    with pytest.raises(PluginError, match=r"plugins\.lock\.json (cannot be read|is of format)"):
        ModelAssembly.from_checkpoint(model, plugins=rescan())


def test_commands_lock_and_verify(model: Path, site: Path, rescan: Callable[[], Plugins]) -> None:
    rescan()
    run = CliRunner().invoke
    missing = run(app, ["plugins", "verify", str(model)])
    assert (missing.exit_code, "write it with janus-modular plugins lock" in missing.stderr) == (2, True)
    locked = run(app, ["plugins", "lock", str(model)])
    assert "acme-adaptors 0.2: " in locked.stdout, locked.output
    done = run(app, ["plugins", "verify", str(model), "--json"])
    assert json.loads(done.stdout) == {
        "checked": ["acme-adaptors", "janus-modular"], "skipped": [], "unneeded": [], "unlocked": [],
        "differences": [],
    }  # fmt: skip
    other_bytes(site)
    rescan()
    changed = run(app, ["plugins", "verify", str(model)])
    assert (changed.exit_code, "other bytes in" in changed.stderr) == (2, True)
    changed = run(app, ["plugins", "verify", str(model), "--json"])
    report = json.loads(changed.stdout)
    assert (changed.exit_code, "other bytes in" in changed.stderr) == (2, True)
    assert report["checked"] == ["janus-modular"]
    assert report["differences"] == [
        {
            "plugin": "acme-adaptors",
            "reason": "acme-adaptors 0.2: other bytes in acme_adaptors/mlp.py",
            "changed": ["acme_adaptors/mlp.py"],
            "added": [],
            "removed": [],
        }
    ]
    for command in ("lock", "verify"):
        absent = run(app, ["plugins", command, str(site / "none")])
        assert f"there is no folder {site / 'none'}; expected a bundle" in absent.stderr
    nowhere = run(app, ["plugins", "lock", str(site)])
    assert "records no plugins; expected a bundle or a checkpoint" in nowhere.stderr


@pytest.fixture
def editable(site: Path) -> Path:
    """Make the distribution an editable one, with all files of its package; return that."""
    info = next(site.glob("*.dist-info"))
    (info / "direct_url.json").write_text('{"url": "file:///acme", "dir_info": {"editable": true}}')
    return site / "acme_adaptors"


def test_what_tools_leave_in_an_editable_package_is_no_change(
    editable: Path, model: Path, rescan: Callable[[], Plugins]
) -> None:
    lock = json.loads(write_lock(model, rescan()).read_text())
    for name in (
        ".mlp.py.swp",
        "mlp.py~",
        ".idea/run.py",
        "__pycache__/mlp.cpython-311.pyc",
        "__pycache__/notes.txt",
    ):
        (editable / name).parent.mkdir(exist_ok=True)
        (editable / name).write_text("x")
        check_lock(model, rescan())
    assert json.loads(write_lock(model, rescan()).read_text()) == lock


@pytest.mark.parametrize(
    "name", ["more.py", "more.pyc", "data.json", "__pycache__/more.py", "__pycache__/a.pyc"]
)
def test_an_added_file_is_called_added(
    editable: Path, model: Path, rescan: Callable[[], Plugins], name: str
) -> None:
    write_lock(model, rescan())
    (editable / name).parent.mkdir(exist_ok=True)
    (editable / name).write_text("x")
    (editable / "__init__.py").unlink()
    (editable / "__init__.pyi").write_text("")
    (editable / "mlp.py").write_text(f"{SOURCE}\n")
    [found] = compare_lock(model, rescan()).differences
    added = sorted([f"acme_adaptors/{name}", "acme_adaptors/__init__.pyi"])
    assert (found.changed, found.added) == (["acme_adaptors/mlp.py"], added)
    assert found.removed == ["acme_adaptors/__init__.py"]
    assert f"; added: {', '.join(added)}; removed: acme_adaptors/__init__.py" in found.reason


def test_a_disabled_plugin_of_a_lock_names_the_variable_to_unset(
    model: Path, rescan: Callable[[], Plugins]
) -> None:
    write_lock(model, rescan())
    plugins = Plugins(rescan().entry_points, disabled=["acme-adaptors"])
    with pytest.raises(PluginError) as error:
        check_lock(model, plugins)
    assert str(error.value).endswith(
        "is disabled by JANUS_DISABLE_PLUGINS=acme-adaptors; to use it, unset the variable."
    )
    assert "Install what was locked" not in str(error.value)
