"""Names of variables, parameters, attributes, functions and classes say what they name."""

from __future__ import annotations

import ast
import re
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
    *("at", "place", "places", "room", "faults", "pick", "never", "forced", "rounding", "feeds", "bars"),
    *("text_next", "image_next", "understanding_at", "generation_at", "drop_condition", "lies_in"),
    *("code_width", "code_vectors", "embedding_width", "head_width", "trained_apart", "left_over"),
}
"""Pronouns, adverbs and participles, which leave open what they name, and former names of several things."""

BANNED_WORDS = {
    *("picture", "pictures", "ragged", "company", "learns", "piece", "pieces", "figures", "sheet", "stretch"),
    *("sketch", "homes", "lies", "said", "told", "tell", "tells", "hear", "heard", "listening", "asked"),
    *("brought", "offer", "offers", "offered", "announce", "announces", "announcement"),
    *("stranger", "strangers", "misfit", "trial", "cure", "cures", "mend", "fault", "refusal", "refusals"),
    *("needing", "lacking", "aside", "widen", "widened", "alike", "agree", "lean", "unfinished"),
    *(
        "lane",
        "lanes",
        "chooser",
        "judge",
        "judges",
        "somebody",
        "nobody",
        "ours",
        "theirs",
        "meant",
        "wanted",
    ),
    *("faults", "misfits", "trials", "cured", "mended", "brings"),
}
"""Words that the field has other terms for; no name contains one (``written_aside``, ``PictureToRead``)."""

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
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
            ):
                yield name, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno


def words(name: str) -> set[str]:
    """Return the words of a name, in lower case."""
    return {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def is_banned(name: str) -> bool:
    return name.strip("_") in BANNED or bool(words(name) & BANNED_WORDS)


def definitions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the name of every function and class of a module, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_no_identifier_is_banned(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    banned = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in files
        for name, line in identifiers(ast.parse(file.read_text("utf-8")))
        if is_banned(name)
    ]
    assert not banned, f"{len(banned)} banned identifiers:\n" + "\n".join(banned)


@pytest.mark.parametrize("folder", ["bench", "tests"])
def test_no_test_fixture_or_helper_has_a_banned_name(folder: str) -> None:
    banned = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        if file != Path(__file__)
        for name, line in definitions(ast.parse(file.read_text("utf-8")))
        if is_banned(name)
    ]
    assert not banned, f"{len(banned)} banned names:\n" + "\n".join(banned)


def test_the_test_finds_each_way_to_define_a_name() -> None:
    source = """
import judge as told
class Part:
    def it(self, one, *theirs, **offers):
        self.kind = found = [said for said in one]
        with open(one) as aside:
            (room := aside)
        try:
            sort(key=lambda heard: heard)
        except OSError as fault:
            pass
        match one:
            case [1, *pieces]:
                pass
            case 2 as figures:
                pass
"""
    assert {name for name, _ in identifiers(ast.parse(source)) if is_banned(name)} == {
        *("told", "Part", "it", "one", "theirs", "offers", "kind", "found", "said", "aside", "room", "heard"),
        *("fault", "pieces", "figures"),
    }


@pytest.mark.parametrize(
    ("name", "banned"),
    [
        ("PictureToRead", True),
        ("written_aside", True),
        ("_widen_rows", True),
        ("drop_condition", True),
        ("_room", True),
        ("max_seq_len_for", False),
        ("default", False),
        ("images_at_once", False),
        ("splice", False),
        ("condition_dropout", False),
    ],
)
def test_words_of_compounds_are_banned_as_names_are(name: str, banned: bool) -> None:
    assert is_banned(name) is banned
