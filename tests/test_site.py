"""The built documentation: every link leads to a file and an anchor of the site, as it must from file://."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The links and the anchors of an HTML file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attributes if value is not None}
        self.links += [values[name] for name in ("href", "src") if name in values]
        self.anchors |= {values[name] for name in ("id", "name") if name in values}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    site = tmp_path_factory.mktemp("docs") / "site"
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    found = sorted(path for path in site.rglob("*.html") if path.name != "404.html")  # of a server alone
    return {path: Page(path.read_text("utf-8")) for path in found}


def test_every_link_leads_to_a_file_and_an_anchor(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            is_there = target.is_file() and (
                target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            broken += [] if is_there else [f"{path.name}: {link}"]
    assert len(pages) > 30
    assert not broken


def test_pages_load_nothing_from_other_hosts(pages: dict[Path, Page]) -> None:
    """The site works without a network, and tells nobody who reads it."""
    for path in pages:
        text = path.read_text("utf-8")
        loaded = [
            line
            for line in text.splitlines()
            if '<script src="http' in line or 'rel="stylesheet" href="http' in line
        ]
        assert not loaded, path.name
