"""The loop in JavaScript that the documentation shows: it draws the pixels of Janus from a bundle."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from janus_export.onnx_export.export import export
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/how-to/plain-onnxruntime.md"
MODULES = ROOT / ".cache/javascript/node_modules"
PROMPT = "Draw the digit seven."


@pytest.mark.slow  # `make weights` fetches onnxruntime-node
def test_the_documented_loop_in_javascript_draws_the_pixels_of_janus(tmp_path: Path):
    node = shutil.which("node")
    if node is None or not MODULES.is_dir():
        pytest.skip("needs node, and onnxruntime-node: make weights")
    torch.manual_seed(0)
    model = ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig))
    for weight in model.model.parameters():
        if weight.dim() > 1:  # larger than at the start of a training, so that choices are clear
            torch.nn.init.normal_(weight, std=0.3)
    Janus.of(model).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "plain-bundle")
    janus = Janus.from_pretrained(tmp_path / "plain-bundle")
    [image] = janus.draw(PROMPT, guidance=2, temperature=0)

    [program] = re.findall(r"^```javascript\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "draw.mjs").write_text(program, "utf-8")
    (tmp_path / "prompt.json").write_text(json.dumps(janus.processor.draw_prompt(PROMPT).tokens.tolist()))
    (tmp_path / "node_modules").symlink_to(MODULES)
    subprocess.run([node, "draw.mjs"], cwd=tmp_path, check=True)
    drawn = json.loads((tmp_path / "pixels.json").read_text())
    pixels = np.array(drawn["data"]).reshape(drawn["dims"])[0].transpose(1, 2, 0)
    assert pixels.std() > 10
    assert np.abs(pixels - np.asarray(image, int)).max() <= 1  # two builds may round a pixel differently
