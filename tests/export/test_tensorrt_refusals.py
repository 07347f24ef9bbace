"""Requests that engines do not support are errors before anything is enqueued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from janus_modular import JanusError, PromptError
from janus_modular.janus import Janus


@pytest.fixture
def opened(machine: Any, built_bundle: Path) -> Janus:
    return Janus.from_pretrained(built_bundle, runtime="tensorrt")


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda janus: janus.draw("a", 5), "rows: 10 at once"),
        (lambda janus: janus.draw("a", 9, guidance=1.0, batch_size=9), "rows: 9 at once"),
        (lambda janus: janus.runtime.open(320), "found 320; expected 319 at most"),
        (lambda janus: janus.chat("x" * 150), "shorten it"),
        (
            lambda janus: janus.runtime.open(9).prefill([janus.processor.draw_prompt("a")]),
            "do not fit into a session of 9",
        ),
        (lambda janus: janus.runtime.run("embed", np.zeros((2, 321), np.int64)), "tokens: 321 at once"),
    ],
)
def test_what_engines_were_not_built_for_is_refused_before_anything_is_enqueued(
    opened: Janus, machine: Any, ask: Any, said: str
):
    with pytest.raises(PromptError) as caught:
        ask(opened)
    assert said in str(caught.value)
    assert machine.counted("enqueue") == machine.counted("copy") == 0


def test_more_images_than_can_be_chosen_for_are_refused(
    machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any
):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    build_engines(folder, "fp32", "tensorrt", changes={"sample_image": {"images": [1, 1, 1]}})
    with pytest.raises(PromptError, match="images: 2 at once, but the engine of 'sample_image'"):
        Janus.from_pretrained(folder, runtime="tensorrt").draw("a", 2)
    assert "sample_image" not in {entry[1] for entry in machine.log if entry[0] == "enqueue"}


def test_a_session_that_is_full_says_so_before_it_writes(opened: Janus, machine: Any):
    prompt = opened.processor.draw_prompt("a")
    session = opened.runtime.open(len(prompt) + 1)
    session.prefill([prompt])
    session.step(np.ones((1, 64), np.float32))
    machine.log.clear()
    with pytest.raises(PromptError, match="larger max_seq_len"):
        session.step(np.ones((1, 64), np.float32))
    assert machine.log == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m, built: m.update(arch=(9, 0)), "compute capability 9.0"),
        (lambda m, built: built.update(builder="10.14.1.48"), "pip install tensorrt==10.14.1.48"),
        (lambda m, built: m.update(count=0), "no CUDA GPU 0 here"),
        (lambda m, built: built["engines"].pop("backbone"), "no engine of 'backbone'"),
        (lambda m, built: built["engines"]["embed"].update(source="0" * 64), "from another graph"),
        (lambda m, built: m.update(room=1000), "cudaErrorMemoryAllocation"),
    ],
)
def test_engines_that_cannot_run_on_this_gpu_are_errors_with_a_hint(
    machine: Any, built_bundle: Path, tmp_path: Path, change: Any, said: str
):
    folder = shutil.copytree(built_bundle, tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(machine.__dict__, manifest["built"]["fp32.tensorrt.sm89"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(JanusError) as caught:
        Janus.from_pretrained(folder, runtime="tensorrt").draw("a")
    assert said in str(caught.value)
    if "GPU 0" not in said and "Memory" not in said:
        assert f"janus-modular build {folder} --target tensorrt" in str(caught.value)


@pytest.mark.parametrize(
    ("graph", "plan", "said"),
    [
        ("backbone", {"aliases": []}, "'present_key_0' is not 'past_key_0' in place"),
        ("decode_image", {"host": ["codes"]}, "'codes' on the host"),
        ("decode_image", {"dtypes": {"codes": "INT32"}}, "'codes' in None, not int64"),
        ("embed", {"profiles": []}, "0 profiles, not 1"),
    ],
)
def test_an_engine_that_is_not_its_graph_is_refused(
    machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any, graph: str, plan: Any, said: str
):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    build_engines(folder, "fp32", "tensorrt", **{graph: plan})
    with pytest.raises(JanusError) as caught:
        Janus.from_pretrained(folder, runtime="tensorrt").draw("a")
    assert said in str(caught.value)


def test_what_tensorrt_says_is_passed_on(machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any):
    """The manifest claims more than the engine has."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    key = build_engines(folder, "fp32", "tensorrt", rows=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    for engine in manifest["built"][key]["engines"].values():
        for profile in engine["profiles"]:
            if "rows" in profile["axes"]:
                profile["axes"]["rows"] = [1, 2, 8]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(JanusError, match="4 is outside of 1 to 3"):
        Janus.from_pretrained(folder, runtime="tensorrt").draw("a", 2)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"device": "cpu"}, "Expected auto, cuda"),
        ({"device": "cuda:1"}, "no CUDA GPU 1 here (there are 1)"),
        ({"variant": "cpu-int4"}, "no tensorrt engines of cpu-int4"),
        ({"runtime": {"name": "tensorrt", "sync_every": 0}}, "sync_every"),
    ],
)
def test_options_that_mean_nothing_are_refused(machine: Any, built_bundle: Path, asked: Any, said: str):
    with pytest.raises(JanusError) as caught:
        Janus.from_pretrained(built_bundle, **{"runtime": "tensorrt", **asked})
    assert said in str(caught.value)


def test_a_bundle_without_engines_says_how_they_are_built(machine: Any, tiny_bundle: Path):
    with pytest.raises(JanusError, match=r"janus-modular build .* --target tensorrt-rtx --precision fp32"):
        Janus.from_pretrained(tiny_bundle, runtime="tensorrt-rtx")
