"""`verify --runtime tensorrt`: engines are verified like graphs, and the manifest records the GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from janus_export.bundle.bundle import load_bundle
from janus_export.reference.target import Reference
from janus_export.runtimes.trt.memory import HostInputs
from janus_export.verify import GATES, verify
from janus_modular.cli.app import app

pytestmark = pytest.mark.usefixtures("one_reference")


def changed(
    folder: Path, graph: str, name: str, by: float, tmp_path: Path, variant: str = "fp32"
) -> dict[str, Any]:
    """Return a plan whose engine is another than its graph: noise of that size in one weight."""
    model = ir.load(folder / f"{graph}.{variant}.onnx")
    values = model.graph.initializers
    value = next(value for key, value in values.items() if key.endswith(name))
    weight = value.const_value.numpy()
    noise = np.random.default_rng(0).normal(0, by, weight.shape).astype(weight.dtype)
    value.const_value = ir.Tensor(weight + noise, name=value.name)
    ir.save(model, tmp_path / "changed.onnx", external_data="changed.data")
    return {graph: {"onnx": str(tmp_path / "changed.onnx")}}


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_sound_engines_pass_and_the_manifest_says_what_ran(
    machine: Any, built_bundle: Path, tmp_path: Path, target: str
):
    folder = shutil.copytree(built_bundle, tmp_path / "bundle")
    line = [
        "verify",
        str(folder),
        "--against",
        "the model",
        "--variant",
        "fp32",
        "--runtime",
        target,
        "--json",
    ]
    run = CliRunner().invoke(app, line)
    assert run.exit_code == 0, run.output
    [report] = json.loads(run.stdout)
    assert set(report["gates"]) == set(GATES) - {"range", "rounding"}
    manifest = load_bundle(folder).manifest
    key = f"fp32.{target}.sm89"
    assert manifest["parity"][f"fp32 {target}"]["passed"]
    done = manifest["executed"][key]
    assert done["passed"]
    shown = CliRunner().invoke(app, ["inspect", str(folder)]).stdout
    assert f"  {key}: passed, {done['at']}, {target} on Stand-in\n" in shown
    assert (done["gpu"], done[target]) == ("Stand-in", manifest["built"][key]["builder"])
    others = {name: one["executed"] for name, one in manifest["built"].items() if name != key}
    assert manifest["built"][key]["executed"]
    assert not any(others.values())


def test_half_precision_is_forced_on_the_engines(
    machine: Any, tiny_gpu_bundle: Path, tmp_path: Path, build_engines: Any
):
    folder = shutil.copytree(tiny_gpu_bundle, tmp_path / "bundle")
    build_engines(folder, "fp16", "tensorrt")
    [report] = verify(folder, "the model", variants=["fp16"], runtime="tensorrt")
    assert report.failures == ""
    assert {"graphs", "rounding", "cache", "drawing"} <= set(report.checks)
    assert [check.name for check in report.checks["drawing"]] == [
        "the same drawing, nothing recorded: pixels"
    ]
    assert {entry[1] for entry in machine.log if entry[0] == "load"} >= {
        "backbone",
        "sample_image",
        "decode_image",
    }


@pytest.mark.parametrize(
    ("gate", "graph", "name", "noise", "said"),
    [
        ("graphs", "understand", "layers.0.weight", 0.1, "understand"),
        ("graphs", "embed_codes", "adaptor.layers.0.weight", 0.1, "embed_codes"),
        ("graphs", "tokenize_image", "weight", 1, "tokenize_image"),
        ("rows", "backbone", "q_proj.weight", 0.01, "variable-length rows: steps"),
        ("answer", "sample_text", "weight", 1, "greedy answers: tokens"),
        ("drawing", "sample_image", "vision_head.weight", 1, "a whole drawing: ids"),
        ("drawing", "decode_image", "weight", 0.3, "a whole drawing: pixels"),
    ],
)
def test_a_gate_looks_at_the_engine(
    machine: Any,
    tiny_bundle: Path,
    tmp_path: Path,
    build_engines: Any,
    gate: str,
    graph: str,
    name: str,
    noise: float,
    said: str,
):
    """The graphs are sound; what differs is what was built."""
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    build_engines(folder, "fp32", "tensorrt", **changed(folder, graph, name, noise, tmp_path))
    [report] = verify(folder, "the model", variants=["fp32"], runtime="tensorrt", gates=[gate])
    assert said in report.failures
    assert load_bundle(folder).manifest["executed"] == {}


@pytest.mark.parametrize(
    ("graph", "name", "noise", "said"),
    [
        ("decode_image", "weight", 0.3, "decode_image: off by"),
        ("understand", "layers.0.weight", 0.1, "understand: off by"),
        ("sample_image", "vision_head.weight", 1, "sample_image: codes"),
    ],
)
def test_engines_of_half_precision_are_compared_and_do_not_count_as_executed(
    machine: Any,
    tiny_gpu_bundle: Path,
    tmp_path: Path,
    build_engines: Any,
    graph: str,
    name: str,
    noise: float,
    said: str,
):
    folder = shutil.copytree(tiny_gpu_bundle, tmp_path / "bundle")
    plan = changed(folder, graph, name, noise, tmp_path, "fp16")
    key = build_engines(folder, "fp16", "tensorrt", **plan)
    [report] = verify(folder, "the model", variants=["fp16"], runtime="tensorrt")
    assert said in report.failures
    assert not load_bundle(folder).manifest["built"][key]["executed"]


def test_a_failure_is_recorded_and_is_no_execution(
    machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any
):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    key = build_engines(
        folder, "fp32", "tensorrt", **changed(folder, "decode_image", "weight", 0.3, tmp_path)
    )
    verify(folder, "the model", variants=["fp32"], runtime="tensorrt")
    manifest = load_bundle(folder).manifest
    assert not manifest["executed"][key]["passed"]
    assert not manifest["built"][key]["executed"]


def test_a_staging_buffer_reused_too_early_is_detected(
    machine: Any, built_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One staging buffer for all steps: whoever listens waits after every step, and so hides it."""
    next_buffer = HostInputs._next_buffer

    def only_one(self: HostInputs) -> Any:
        if self.ahead > 1:
            self.used, self.epoch = 0, self.gpu.epoch
        return next_buffer(self)

    monkeypatch.setattr(HostInputs, "_next_buffer", only_one)
    [report] = verify(built_bundle, "the model", variants=["fp32"], runtime="tensorrt", gates=["drawing"])
    assert [c.name for c in report.checks["drawing"] if not c.passed] == [
        "the same drawing, nothing recorded: pixels"
    ]


def test_questions_that_engines_have_no_room_for_are_left_out(
    machine: Any, tiny_bundle: Path, tmp_path: Path, build_engines: Any, reference: Reference
):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    lengths = [len(reference.processor.chat_prompt(question)) + 24 for question in reference.prompts]
    build_engines(folder, "fp32", "tensorrt", capacity=max(lengths) - 1)
    gates = ["rows", "answer"]
    [report] = verify(folder, "the model", variants=["fp32"], runtime="tensorrt", gates=gates)
    assert report.failures == ""
    assert reference.within(max(lengths) - 1) is not reference
    assert reference.within(max(lengths)) is reference
