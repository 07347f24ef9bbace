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

import numpy as np
import openai
import pytest
from PIL import Image

from janus_modular.janus import Janus

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
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
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
    with pytest.raises(AssertionError, match="differs from the manifest's hash"), server(bundle):
        pass
