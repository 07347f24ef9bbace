"""The built documentation in Chromium, from file://: no page is wider than its window or logs an error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (500, 1280, 1600)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]

HARNESS = """<!doctype html><meta charset="utf-8"><script>
const pages = PAGES, widths = WIDTHS;
const frame = document.createElement("iframe");
frame.style.cssText = "border:0;height:900px";
const load = (page) => new Promise((done) => { frame.onload = done; frame.src = page; });
addEventListener("load", async () => {
  document.body.append(frame);
  for (const page of pages) {
    for (const width of widths) {
      frame.style.width = `${width}px`;
      await load(page);
      const root = frame.contentDocument.documentElement;
      const broken = [...frame.contentDocument.images].filter((i) => i.complete && !i.naturalWidth).length;
      console.log(`VIEW ${page} ${width} ${root.scrollWidth - root.clientWidth} ${broken} END`);
    }
  }
  console.log("DONE");
});
</script>"""

Views = tuple[list[tuple[str, int, int, int]], list[str]]
"""Page, window width, hidden width and number of broken images of each view; and what pages logged."""


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Views:
    site = tmp_path_factory.mktemp("browser") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
    files = sorted(path for path in site.rglob("*.html") if path.name != "404.html")  # of a server alone
    pages = [path.relative_to(site).as_posix() for path in files]
    harness = site / "harness.html"
    text = HARNESS.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(WIDTHS))
    harness.write_text(text, "utf-8")
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    flags += ["--enable-logging=stderr", "--window-size=1700,1000", f"--user-data-dir={site.parent}/profile"]
    rows, log = [], []
    with subprocess.Popen([BROWSER, *flags, harness.as_uri()], stderr=subprocess.PIPE, text=True) as browser:
        assert browser.stderr is not None
        for line in browser.stderr:  # until the last page is shown, or the browser has ended
            if match := re.search(r'"VIEW (\S+) (\d+) (-?\d+) (\d+) END"', line):
                rows.append((match[1], *map(int, match.groups()[1:])))
            elif '"DONE"' in line:
                break
            elif ":CONSOLE" in line:
                log.append(line)
        browser.terminate()
    assert len(rows) == len(pages) * len(WIDTHS) > 100
    return rows, log


def test_no_page_is_wider_than_its_window(views: Views) -> None:
    assert [row for row in views[0] if row[2] > 0] == []


def test_no_image_is_broken(views: Views) -> None:
    assert [row for row in views[0] if row[3]] == []


def test_no_page_logs_an_error(views: Views) -> None:
    assert [line for line in views[1] if re.search(r"(?i)error|uncaught|failed|refused", line)] == []
