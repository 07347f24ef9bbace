"""The web page of a server, by Gradio's own client, and what it sends."""

from __future__ import annotations

import base64
import itertools
import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from janus_modular.errors import ServingError
from janus_modular.janus import Janus
from janus_modular.ui.api_client import ApiClient
from janus_modular.ui.chat_messages import messages_of

IMAGE = Image.new("RGB", (40, 30), "orange")


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    IMAGE.save(tmp_path / "orange.png")
    return tmp_path / "orange.png"


def test_the_client_streams_answers_and_images(served: Any, tiny_janus: Janus):
    with closing(ApiClient(f"{served.address}/v1")) as client:
        assert client.model()["id"] == "tiny"
        texts = [*client.chat([{"role": "user", "content": "what?"}], max_tokens=9)]
        *_, last = client.draw("a cat", seed=5)
    assert texts[-1] == tiny_janus.chat("what?", max_tokens=9)
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    [expected] = tiny_janus.draw("a cat", 1, seed=5)
    assert Image.open(BytesIO(base64.b64decode(last["b64_json"]))).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({}, lambda client: client.draw("a", size="1x1"), "size: found 1x1; the model draws 32x32"),
        ({"deadline": 1e-6}, lambda client: client.draw("a"), "was cancelled at its deadline"),
        ({"keys": True}, lambda client: client.model(), "API key"),
        (None, lambda client: client.model(), "janus-modular serve MODEL"),
    ],
)
def test_the_client_raises_the_message_of_the_server(
    settings: dict[str, Any] | None, call: Any, message: str, start: Any, tmp_path: Path
):
    if settings and settings.pop("keys", False):
        (tmp_path / "keys").write_text("0123456789abcdef")
        settings = {"api_keys": str(tmp_path / "keys")}
    address = "http://127.0.0.1:9" if settings is None else start(**settings).address
    with closing(ApiClient(address)) as client, pytest.raises(ServingError, match=message):
        [*call(client)]


def test_a_chat_becomes_messages_with_its_images(image_file: Path):
    data = base64.b64encode(image_file.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    history = [
        {"role": "user", "content": [{"type": "file", "file": {"path": str(image_file)}}]},
        {"role": "user", "content": [{"type": "text", "text": "which?"}]},
        {"role": "assistant", "content": "orange"},
    ]
    question = {"text": "sure?", "files": [str(image_file)]}
    assert messages_of(history, question) == [
        {"role": "user", "content": [image, {"type": "text", "text": "which?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "orange"}]},
        {"role": "user", "content": [image, {"type": "text", "text": "sure?"}]},
    ]


@pytest.fixture(scope="module")
def page(served: Any, open_page: Any) -> Iterator[str]:
    """The address of a page on the server, in a process of its own."""
    with open_page(served.address) as address:
        yield address


CLIENT = """
import json, sys
from gradio_client import Client, handle_file

address, file, downloads = sys.argv[1:]
client = Client(address, verbose=False, download_files=downloads)
question = {"text": "which?", "files": [handle_file(file)]}
answer = client.predict(question, 9, 0, "0", api_name="/chat")
job = client.submit("a cat", 2, 2, 1, "5", api_name="/draw")
gallery, settings = job.result()
images = [shown["image"] for shown in gallery]
print(json.dumps({"answer": answer, "images": images, "settings": settings, "updates": len(job.outputs())}))
"""


@pytest.mark.slow
def test_the_page_chats_and_draws(
    page: str, page_python: Path, tiny_janus: Janus, image_file: Path, tmp_path: Path
):
    line = [page_python, "-c", CLIENT, page, str(image_file), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert got["answer"] == tiny_janus.chat("which?", [IMAGE], max_tokens=9)
    assert (got["settings"]["guidance"], got["settings"]["seed"]) == (2, 5)
    expected = tiny_janus.draw("a cat", 2, guidance=2, seed=5)
    for file, drawn in zip(got["images"], expected, strict=True):
        pixels = np.asarray(Image.open(file).convert("RGB"), int)
        assert np.abs(pixels - np.asarray(drawn, int)).max() <= 1  # decoded in another batch
    assert got["updates"] > 1  # the images came one after the other


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere(page: str):
    """Links to other sites are not fetched; styles, fonts and scripts are, and lie on this machine."""
    with httpx.Client(base_url=page, trust_env=False) as client:
        text = client.get("/").text
        loaded = re.findall(r"""<(?:script|link)[^>]*(?:src|href)=["']?(https?:[^"' >]+)""", text)
        assert loaded == []
        assert "http" not in str(client.get("/config").json().get("stylesheets"))
        assert not re.search(r"@import|url\(.?https?:", client.get("/theme.css").text)


@pytest.mark.slow
def test_a_page_of_a_running_server_takes_no_options_of_a_model(served: Any, page_python: Path):
    line = [page_python, "-m", "janus_modular", "ui", served.address, "--variant", "fp32", "--rows", "4"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--rows, --variant" in done.stderr
