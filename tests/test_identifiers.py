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

PACKAGES = ("export", "janus_modular", "plugins")


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


@pytest.mark.parametrize("package", PACKAGES)
def test_no_identifier_is_banned(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    banned = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in files
        for name, line in identifiers(ast.parse(file.read_text("utf-8")))
        if name.strip("_") in BANNED
    ]
    assert not banned, f"{len(banned)} banned identifiers:\n" + "\n".join(banned)


def test_the_test_finds_each_way_to_define_a_name() -> None:
    source = "class Part:\n    def it(self, one):\n        self.kind = found = [said for said in one]"
    assert {name for name, _ in identifiers(ast.parse(source)) if name in BANNED} == {
        "Part", "it", "one", "kind", "found", "said",
    }  # fmt: skip
