"""Who may import whom, and how files are called: what `lint-imports` does not see."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("janus_modular", "plugins", "export", "tests", "bench")
OURS = ("janus_modular", "janus_plugins", "janus_export")
# Names that say nothing: a file called so collects what has no place.
NO_NAMES = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
LONGEST = 400  # lines


def sources() -> list[Path]:
    """Return every Python file of ours that is not ignored."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.pyi"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        return [
            file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py*") if file.suffix != ".pyc"
        ]


def imported(file: Path, *, top_level: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports, those for type checkers alone left out with ``top_level``."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_keeps_the_rules_of_the_house(file: Path):
    assert file.stem.lower().strip("_") not in NO_NAMES
    lines = len(file.read_text("utf-8").splitlines())
    assert lines <= LONGEST, f"{lines} lines: split it by what its parts do"
    # names that only an editable install can see, and that a wheel does not have
    roots = {name.partition(".")[0] for name in imported(file)}
    assert not roots & {"plugins", "export", "configs", "tests"}


# The demo is an application, not a component: it trains and measures with the modules that commands use.
APPLICATION = ROOT / "plugins/janus_plugins/demo"


@pytest.mark.parametrize(
    "file",
    sorted(file for file in (ROOT / "plugins").rglob("*.py") if APPLICATION not in file.parents),
    ids=lambda file: str(file.relative_to(ROOT / "plugins")),
)
def test_built_in_components_import_the_core_as_third_parties_do(file: Path):
    core = {name for name in imported(file) if name.partition(".")[0] in OURS}
    neighbours = {name for name in core if name.startswith("janus_plugins.")}
    assert core - neighbours <= {"janus_modular"}


@pytest.mark.parametrize("name", ["interfaces", "registry", "errors"])
def test_the_runtime_contract_imports_no_other_module(name: str):
    names = ("interfaces", "registry", "errors", "protocols", "objectives")
    contract = {f"janus_modular.{one}" for one in names}
    ours = {
        one for one in imported(ROOT / "janus_modular" / f"{name}.py", top_level=True) if one.startswith(OURS)
    }
    assert ours <= contract


def test_the_public_names_are_all_there():
    import janus_modular

    assert len(janus_modular.__all__) > 30
    for name in janus_modular.__all__:
        assert getattr(janus_modular, name) is not None
