"""The wheel: what is inside, and that it works where there is no checkout. And the lists that must agree."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import tomllib
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "janus_modular": ROOT / "janus_modular",
    "janus_plugins": ROOT / "plugins" / "janus_plugins",
    "janus_export": ROOT / "export" / "janus_export",
}
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def installed(new_environment: Callable[[str], Any]) -> Any:
    """An environment with the wheel in it."""
    return new_environment("elsewhere")


@pytest.fixture
def command(installed: Any, tmp_path: Path) -> Command:
    """Run a program of that environment, in an empty folder, and expect it to succeed."""
    return partial(installed.run, tmp_path)


def test_the_wheel_holds_three_packages_whole_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    kept = {
        f"{package}/{file.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    configs = {
        f"janus_modular/configs/{file.relative_to(ROOT / 'configs').as_posix()}"
        for file in (ROOT / "configs").rglob("*")
        if file.is_file()
    }
    assert {name for name in names if ".dist-info/" not in name} == kept | configs
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_what_is_installed_is_the_wheel_and_not_this_checkout(command: Command, installed: Any):
    code = (
        "import janus_modular, janus_plugins, janus_export, importlib.metadata as m, importlib.util as u\n"
        "print(*(one.__file__ for one in (janus_modular, janus_plugins, janus_export)), sep='\\n')\n"
        "print([d.version for d in m.distributions() if d.metadata['Name'] == 'janus-modular'])\n"
        "print([n for n in ('plugins', 'export', 'configs', 'tests') if u.find_spec(n)])"
    )
    *files, versions, stray = command("python", "-c", code).stdout.splitlines()
    assert all(Path(file).is_relative_to(installed.folder) for file in files)
    assert versions == str([project()["version"]])
    assert stray == "[]"


def test_the_installed_command_finds_its_configs_and_components(command: Command):
    listed = command("janus-modular", "config", "list").stdout
    for file in (ROOT / "configs").rglob("*.yaml"):
        assert file.relative_to(ROOT / "configs").with_suffix("").as_posix() in listed
    rows = command("janus-modular", "plugins", "list").stdout
    for slot, name in declared_components():
        assert re.search(rf"^{slot} +{re.escape(name)} ", rows, re.MULTILINE), (slot, name)
    assert "is valid" in command("janus-modular", "config", "validate", "model/tiny").stdout


@pytest.mark.slow
def test_the_installed_command_runs_the_demo(command: Command, tmp_path: Path):
    parts = (
        "classifier",
        "stages.tokenizer",
        "stages.encoder",
        "stages.words",
        "stages.stage1",
        "stages.stage2",
        "stages.stage3",
    )
    few = [f"{part}.schedule.steps=2" for part in parts]
    few += ["model.generation.tokenizer.continuous_steps=1", "count=20"]
    command("janus-modular", "demo", "--quiet", "--out", "demo", *few)
    report = json.loads((tmp_path / "demo/report.json").read_text("utf-8"))
    assert {"reading_accuracy", "drawing_accuracy", "diversity_ratio", "psnr_db"} <= set(report)
    assert "<html" in (tmp_path / "demo/report.html").read_text("utf-8")
    command("janus-modular", "draw", "demo/model", "Draw the digit seven.", "-n", "2", "-o", "sevens.png")
    asked = (
        "chat",
        "demo/model",
        "Which digit is this?",
        "--image",
        "sevens-0.png",
        "--max-tokens",
        "4",
        "--json",
    )
    assert "answer" in json.loads(command("janus-modular", *asked).stdout)
    command("janus-modular", "demo", "ablation", "--quiet", "--seeds", "1", "--out", "ablation", *few)
    assert len(json.loads((tmp_path / "ablation/ablation.json").read_text("utf-8"))) == 1


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def declared_components() -> dict[tuple[str, str], str]:
    """Slot and name -> module, as pyproject has it."""
    return {
        (group.removeprefix("janus_modular.v1."), name): module
        for group, points in project()["entry-points"].items()
        if group.startswith("janus_modular.v1.")
        for name, module in points.items()
    }


def hooks_of(file: Path) -> list[ast.FunctionDef]:
    """Return the functions of a file that are marked as hooks."""
    tree = ast.parse(file.read_text("utf-8"))
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(mark, ast.Name) and mark.id == "hookimpl" for mark in node.decorator_list)
    ]


def test_every_file_with_a_hook_is_announced_under_the_names_that_it_registers():
    found = {}
    for package in ("janus_plugins", "janus_export"):
        for file in PACKAGES[package].rglob("*.py"):
            module = ".".join(file.relative_to(PACKAGES[package].parent).with_suffix("").parts)
            for hook in hooks_of(file):
                for call in ast.walk(hook):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "registry.add":
                        name = ast.literal_eval(call.args[0])
                        found[hook.name.removeprefix("register_"), name] = module
    assert found == declared_components()
    folders = {"text_samplers": "samplers", "image_samplers": "samplers"}  # the other slots have one each
    assert all(module.split(".")[1] == folders.get(slot, slot) for (slot, _), module in found.items())


@pytest.mark.parametrize(
    "group",
    [
        "janus_modular.checks",
        "janus_modular.commands",
        "janus_modular.configs",
        "janus_plugins.post_training_steps",
    ],
)
def test_what_else_is_announced_is_there(group: str):
    for target in project()["entry-points"].get(group, {}).values():
        module, _, name = target.partition(":")
        assert hasattr(importlib.import_module(module), name), target


def test_tests_find_what_they_run_in_the_extra_that_developers_install():
    wanted = {re.split(r"[<>=\[]", one)[0] for one in project()["optional-dependencies"]["dev"]}
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    assert {re.split(r"[<>=\[]", one)[0] for one in backend} <= wanted  # the wheel is built without a network
