"""A plugin for every slot, as `plugins new` writes it, installed beside the wheel: no checkout in sight."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from janus_modular.registry import SLOTS, slot_label

TRAIN_CONFIG = """
model: tiny
learn: [understanding.adaptor, generation, backbone]
sources:
  draw: {name: acme-source}
  read: {name: jsonl, path: read.jsonl, task: read}
mixture: {draw: 1, read: 1}
batch: 4
length: 512
accumulate: 1
supervise: all
optimizer: {lr: 1.0e-3}
schedule: {name: constant, warmup: 0, steps: 1}
output: run
trackers: [{name: acme-tracker}]
"""


@pytest.mark.slow
def test_a_plugin_for_every_slot_is_installed_beside_the_wheel_and_used(
    new_environment: Callable[[str], Any], tmp_path: Path
):
    environment = new_environment("third_party")
    run = partial(environment.run, tmp_path)
    names = {slot: f"acme-{slot_label(slot).replace(' ', '-')}" for slot in SLOTS}
    for name in names.values():
        run("janus-modular", "plugins", "new", name, "--slot", name.removeprefix("acme-"))
    environment.install(*(tmp_path / name for name in names.values()))

    rows = run("janus-modular", "plugins", "list").stdout
    for slot, name in names.items():
        assert re.search(rf"^{slot} +{name} ", rows, re.MULTILINE), name
    tests = (
        "-q",
        "-rp",
        "-m",
        "not slow",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
    )
    config = f"{names['adaptors']}/pyproject.toml"  # all have the same
    done = run("python", "-m", "pytest", "-c", config, *tests, *(f"{name}/tests" for name in names.values()))
    assert "failed" not in done.stdout  # they are held to their slots' contracts
    for name in names.values():
        assert re.search(rf"^PASSED \S*test_{name.replace('-', '_')}\.py::", done.stdout, re.MULTILINE), name
    assert " ok" in run("janus-modular", "plugins", "doctor").stdout

    Image.new("RGB", (40, 30), "orange").save(tmp_path / "orange.png")
    (tmp_path / "read.jsonl").write_text('{"image": "orange.png", "caption": "It is orange."}\n')
    (tmp_path / "train.yaml").write_text(TRAIN_CONFIG)
    parts = {
        "understanding.encoder": "understanding_encoders",
        "understanding.adaptor": "adaptors",
        "generation.tokenizer": "image_tokenizers",
        "generation.adaptor": "adaptors",
        "generation.head": "heads",
        "backbone": "backbones",
        "text_sampler": "text_samplers",
        "image_sampler": "image_samplers",
    }
    swapped = [f"model.{part}={names[slot]}" for part, slot in parts.items()]
    for output, changes in (("parts", swapped), ("path", [f"model.generation={names['generation']}"])):
        run("janus-modular", "train", "train.yaml", "--quiet", f"output={output}", *changes)
        assert "loss" in (tmp_path / output / "acme-tracker.txt").read_text()  # by the tracker
        run("janus-modular", "export", f"{output}/model", f"{output}/bundle")
        proof = run("janus-modular", "verify", f"{output}/bundle", "--against", f"{output}/model", "--json")
        assert all(one["passed"] for one in json.loads(proof.stdout))
        for model in (f"{output}/model", f"{output}/bundle"):
            run("janus-modular", "draw", model, "Draw red.", "-o", f"{model}.png")
            asked = ("chat", model, "What is it?", "--image", "orange.png", "--max-tokens", "4", "--json")
            assert "answer" in json.loads(run("janus-modular", *asked).stdout)
        drawn, exported = (Image.open(tmp_path / output / f"{name}.png") for name in ("model", "bundle"))
        assert np.abs(np.asarray(drawn, int) - np.asarray(exported, int)).max() <= 1  # of 255

    run("janus-modular", "convert", "parts/model", "theirs", "--format", names["formats"])
    run("janus-modular", "draw", "theirs", "Draw red.", "-o", "theirs.png")
    assert Image.open(tmp_path / "theirs.png").tobytes() == Image.open(tmp_path / "parts/model.png").tobytes()
    asked = (
        "chat",
        "path/bundle",
        "What is it?",
        "--runtime",
        names["runtimes"],
        "--max-tokens",
        "4",
        "--json",
    )
    assert "answer" in json.loads(run("janus-modular", *asked).stdout)
