"""The web page of a model in Chromium, as a person uses it: nothing but this machine is asked."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from string import ascii_letters
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]

QUESTION, PROMPT = "Which digit is this?", "Draw the digit seven."


@pytest.fixture(scope="module")
def janus() -> Janus:
    """A model of random weights whose answers are letters: a page shows them as they are.

    The rows of its output layer, which is also its token embedding, are 0 for all other tokens.
    """
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    janus = Janus.of(assembly)
    embedding = assembly.model.get_parameter("backbone.model.model.embed_tokens.weight")
    decode = janus.processor.tokenizer.decode
    is_letter = [decode([token]) in {*ascii_letters} for token in range(len(embedding))]
    assert sum(is_letter) == len(ascii_letters)
    with torch.no_grad():
        embedding.mul_(torch.tensor(is_letter)[:, None])
    return janus


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handwritten digit as a file."""
    from sklearn.datasets import load_digits

    pixels = np.kron(load_digits().images[7] * 15, np.ones((8, 8))).astype(np.uint8)
    file = tmp_path_factory.mktemp("digit") / "seven.png"
    Image.fromarray(pixels).convert("RGB").save(file)
    return file


@pytest.fixture(scope="module")
def address(janus: Janus, open_page: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page") / "model"
    janus.save_pretrained(folder)
    with open_page(str(folder)) as started:
        yield started


@pytest.fixture(scope="module")
def browser(page_python: Path) -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright, which is beside this environment."""
    [packages] = (page_python.parents[1] / "lib").glob("python*/site-packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(packages)])
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            yield started
            started.close()


@contextmanager
def visiting(browser: Any, address: str) -> Iterator[Any]:
    """Open the page; at the end nothing has failed, and no other machine was asked."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(120_000)
    errors: list[str] = []
    hosts: set[str | None] = set()
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(address)
    yield page
    page.close()
    assert errors == []
    assert hosts - {None} == {"127.0.0.1"}  # None: data that is in the address itself


def set_longest_answer(page: Any, tokens: int) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("number input for Longest answer").fill(str(tokens))


def ask(page: Any, question: str, *files: Path) -> None:
    if files:
        page.locator("input[type=file]").set_input_files(files)
        page.locator(".thumbnail-item img").wait_for()  # it is uploaded
    page.get_by_placeholder("Ask").fill(question)
    page.get_by_placeholder("Ask").press("Enter")


def test_a_person_asks_about_an_image(browser: Any, address: str, janus: Janus, digit: Path):
    from playwright.sync_api import expect

    answer = str(janus.chat(QUESTION, [digit], max_tokens=24))
    assert len(answer) == 24
    assert answer != str(janus.chat(QUESTION, max_tokens=24))  # the image matters
    with visiting(browser, address) as page:
        set_longest_answer(page, 24)
        ask(page, QUESTION, digit)
        expect(page.get_by_test_id("bot")).to_have_text(answer, timeout=120_000)
        shown = page.get_by_test_id("user").locator("img")
        assert Image.open(BytesIO(page.request.get(shown.get_attribute("src")).body())).size == (64, 64)


def test_a_person_draws(browser: Any, address: str, janus: Janus):
    from playwright.sync_api import expect

    with visiting(browser, address) as page:
        page.get_by_role("tab", name="Draw").click()
        page.get_by_label("What to draw").fill(PROMPT)
        page.get_by_label("number input for Images").fill("2")
        page.get_by_label("Seed").locator("visible=true").fill("5")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.get_by_test_id("json")).to_contain_text(re.compile(r'"seed":\s*5'), timeout=120_000)
        images = page.locator(".grid-container img")
        expect(images).to_have_count(2)
        drawn = [page.request.get(image.get_attribute("src")).body() for image in images.all()]
    for file, expected in zip(drawn, janus.draw(PROMPT, 2, guidance=5, seed=5, batch_size=1), strict=True):
        assert Image.open(BytesIO(file)).convert("RGB").tobytes() == expected.tobytes()


def test_an_empty_seed_is_random(browser: Any, address: str):
    with visiting(browser, address) as page:
        page.get_by_role("tab", name="Draw").click()
        page.get_by_label("What to draw").fill(PROMPT)
        assert page.get_by_label("Seed").locator("visible=true").input_value() == ""
        with page.expect_request(re.compile("/queue/join")) as request:
            page.get_by_role("button", name="Draw", exact=True).click()
        assert request.value.post_data_json["data"] == [PROMPT, 4, 5, 1, ""]


def test_what_the_server_refuses_is_shown(browser: Any, address: str):
    from playwright.sync_api import expect

    with visiting(browser, address) as page:
        ask(page, "why? " * 200)
        expect(page.get_by_test_id("toast-body")).to_contain_text("512", timeout=120_000)
        page.get_by_role("tab", name="Draw").click()
        page.get_by_label("Seed").locator("visible=true").fill("five")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.get_by_test_id("toast-body").last).to_contain_text("found 'five'", timeout=120_000)
