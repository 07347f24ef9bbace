"""A bundle behind a server: without torch, over OpenAI's client, and refused if its files were changed."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.errors import BundleError
from janus_modular.janus import Janus
from janus_modular.server import run
from janus_modular.server.service import Service
from janus_modular.server.settings import ServerConfig

REFUSED = ("torch", "transformers", "safetensors", "onnx", "onnx_ir", "onnxscript")
"""What a server of bundles does without."""

PROGRAM = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
from janus_modular.cli.app import app
app(sys.argv[1:])
"""


@contextmanager
def server(*words: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve in a process without torch; yield the address that it prints."""
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", PROGRAM, "serve", *map(str, words), "--port", "0"]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            printed = ""
            for printed in process.stderr:
                if address := re.search(r"http://\S+(?=/v1)", printed):
                    yield address[0], process
                    break
            else:
                raise AssertionError(f"the server did not start: {printed}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def client_of(address: str) -> openai.OpenAI:
    """Return the official client, which tries once."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_a_bundle_is_served_without_torch(tiny_bundle: Path, tmp_path: Path):
    image = Image.new("RGB", (40, 30), "orange")
    file = BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "which?"}
    ]  # fmt: skip
    janus = Janus.from_pretrained(tiny_bundle)
    with server(tiny_bundle, "name=tiny") as (address, process):
        with client_of(address) as client:
            [model] = client.models.list().data
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=9
            )
            drawn = client.images.generate(prompt="a cat", n=2, extra_body={"seed": 4, "guidance": 2})
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM  # after it has closed all connections
        assert process.stderr is not None
        log = [json.loads(line) for line in process.stderr]
    assert model.variant == "fp32"
    assert answer.choices[0].message.content == janus.chat("which?", [image], max_tokens=9)
    expected = janus.draw("a cat", 2, seed=4, guidance=2)
    for data, one in zip(drawn.data or (), expected, strict=True):
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(data.b64_json or ""))), int)
        assert np.abs(pixels - np.asarray(one, int)).max() <= 1  # decoded in another batch
    assert [line["status"] for line in log] == [200, 200, 200]


def test_a_bundle_whose_weights_were_changed_is_not_served(tiny_bundle: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text("utf-8"))
    weights = bundle / manifest["variants"]["fp32"]["weights"][0]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    done = CliRunner().invoke(app, ["serve", str(bundle)])
    assert done.exit_code == 2
    assert "differs from the manifest's hash" in done.stderr
    janus = Janus.from_pretrained(bundle)  # as the page's own server and Ray's replicas do
    with (
        pytest.raises(BundleError, match="differs from the manifest's hash"),
        run.serving_in_background(janus, ServerConfig(port=0), str(bundle)),
    ):
        pass


def test_the_threads_of_a_bundle_are_an_option(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    services: list[Service] = []
    monkeypatch.setattr(run, "serve", lambda service, on_start: services.append(service))
    done = CliRunner().invoke(app, ["serve", str(tiny_bundle), "--threads", "3"])
    assert done.exit_code == 0
    services[0].engine.close()
    session = services[0].janus.runtime.graph("backbone").session  # type: ignore[attr-defined]
    assert session.get_session_options().intra_op_num_threads == 3
    done = CliRunner().invoke(app, ["serve", str(tiny_checkpoint), "--threads", "3"])
    assert done.exit_code == 2
    assert "set the variable OMP_NUM_THREADS=3" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_a_server_that_was_killed_goes_on_with_its_drawings(tiny_bundle: Path, tmp_path: Path):
    """A client that sends the same request again, with its id and without a seed, gets the same images."""
    options: dict[str, Any] = {
        "prompt": "a cat", "n": 8, "extra_body": {"guidance": 2}, "extra_headers": {"x-request-id": "mine"}
    }  # fmt: skip
    words = (tiny_bundle, "rows=2", f"journal={tmp_path / 'journal'}")
    with server(*words) as (address, process), client_of(address) as client:
        events = iter(client.images.generate(**options, stream=True, partial_images=1))
        next(events)  # the first of eight images is half drawn
        process.kill()
        with pytest.raises((openai.APIConnectionError, httpx.HTTPError)):
            list(events)
    with server(*words) as (address, _), client_of(address) as client:
        drawn = [client.images.generate(**options) for _ in range(2)]
    assert drawn[0].data == drawn[1].data
    expected = Janus.from_pretrained(tiny_bundle).draw("a cat", 8, guidance=2, seed=drawn[0].settings["seed"])
    for data, one in zip(drawn[0].data or (), expected, strict=True):
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(data.b64_json or ""))), int)
        assert np.abs(pixels - np.asarray(one, int)).max() <= 1  # decoded in another batch
