"""Takes docs/assets/page.png: the web page of the demo's model, its chat beside its drawings.

After a change of the page, and ``make demo``, take it again:

    make .cache/page/installed && .cache/page/bin/python docs/screenshot.py
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "runs/demo"
SIZE = {"width": 720, "height": 800}
COLORS = 128
"""Of the file: a page has few, and the file is a third as large."""


@contextmanager
def page_of(model: Path) -> Iterator[str]:
    """Run ``janus-modular ui`` on a model until the block ends; yield the page's address."""
    line = [sys.executable, "-u", "-m", "janus_modular", "ui", str(model), "--port", "0"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if address := re.search(r"http://127\.0\.0\.1:\d+", text):
                yield address[0]
                break
        process.send_signal(signal.SIGTERM)


def chat(page: Page) -> None:
    """Ask about the demo's example."""
    page.locator("input[type=file]").set_input_files(DEMO / "example.png")
    page.locator(".thumbnail-item img").wait_for()
    page.get_by_placeholder("Ask").fill("Which digit is this?")
    page.get_by_placeholder("Ask").press("Enter")
    page.get_by_role("button", name="Retry").wait_for()  # the answer is complete


def draw(page: Page) -> None:
    """Draw sevens, always the same."""
    page.get_by_role("tab", name="Draw").click()
    page.get_by_label("What to draw").fill("Draw the digit seven.")
    page.get_by_label("number input for Guidance").fill("2")
    page.get_by_label("Seed").locator("visible=true").fill("1")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_test_id("json").get_by_text("guidance").wait_for()
    page.wait_for_load_state("networkidle")


def main() -> None:
    """Write the file."""
    views = []
    with page_of(DEMO / "model") as address, sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for act in (chat, draw):
            page = browser.new_page(viewport=SIZE)
            page.set_default_timeout(300_000)
            page.goto(address)
            act(page)
            views.append(Image.open(BytesIO(page.screenshot(animations="disabled"))).convert("RGB"))
        browser.close()
    both = Image.new("RGB", (2 * SIZE["width"], SIZE["height"]))
    for number, view in enumerate(views):
        both.paste(view, (number * SIZE["width"], 0))
    both.quantize(COLORS).save(ROOT / "docs/assets/page.png", optimize=True)


if __name__ == "__main__":
    main()
