"""Names of variables, parameters, attributes, functions and classes say what they name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BANNED = {
    *("one", "ones", "it", "those", "them", "other", "others", "here", "there", "what", "who", "whom"),
    *(
        "said",
        "told",
        "heard",
        "asked",
        "given",
        "found",
        "shown",
        "made",
        "left",
        "taken",
        "meant",
        "wanted",
    ),
    *("kind", "kinds", "Part", "Slot", "Piece"),
}
"""Pronouns, adverbs and participles, which leave open what they name, and former names of several things."""

CLEAN = (
    "export/janus_export/__init__.py",
    "export/janus_export/bench",
    "export/janus_export/bundle",
    "export/janus_export/checks.py",
    "export/janus_export/commands",
    "export/janus_export/config.py",
    "export/janus_export/demo_step.py",
    "export/janus_export/errors.py",
    "export/janus_export/onnx_export",
    "export/janus_export/process_memory.py",
    "export/janus_export/reference",
    "export/janus_export/runtimes",
    "export/janus_export/tensorrt_build",
    "export/janus_export/verify.py",
    "janus_modular",
    "plugins",
)
"""The folders and files without banned identifiers."""


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every identifier that a module defines, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno


def sources(path: Path) -> list[Path]:
    """Return the Python files of a folder, or the file itself."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("path", CLEAN)
def test_no_identifier_is_banned(path: str) -> None:
    assert (ROOT / path).exists()
    banned = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in sources(ROOT / path)
        for name, line in identifiers(ast.parse(file.read_text("utf-8")))
        if name.strip("_") in BANNED
    ]
    assert not banned, f"{len(banned)} banned identifiers:\n" + "\n".join(banned)


def test_the_test_finds_each_way_to_define_a_name() -> None:
    source = "class Part:\n    def it(self, one):\n        self.kind = found = [said for said in one]"
    assert {name for name, _ in identifiers(ast.parse(source)) if name in BANNED} == {
        "Part", "it", "one", "kind", "found", "said",
    }  # fmt: skip
