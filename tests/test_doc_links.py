"""Links in pages lead to files and headings, and files that pages name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from janus_modular.config.presets import shipped

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[!.]*/README.md"), *(ROOT / "docs").rglob("*.md")])
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^(```+).*?^\1$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


@EACH_PAGE
def test_link_targets_exist(page: Path):
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@EACH_PAGE
def test_named_files_exist(page: Path):
    tops = "janus_modular|plugins|export|configs|tests|docs|bench"
    for name in re.findall(rf"`((?:{tops})/[\w./-]+)`", prose(page)):
        assert (ROOT / name).exists() or name in shipped(), name
