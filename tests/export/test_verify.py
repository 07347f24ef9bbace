"""Every gate passes for an unchanged bundle, and fails for a bundle with the error that the gate detects."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from janus_export.bundle.bundle import load_bundle
from janus_export.errors import BundleError
from janus_export.verify import GATES
from janus_modular.cli.app import app

Change = Callable[[ir.Model], None]


INT8 = {"bits": 8, "block_size": 32, "form": "nbits", "graphs": ["backbone"], "quantized": [], "skipped": {}}

pytestmark = pytest.mark.usefixtures("one_reference")


def first(model: ir.Model, op: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op)


def test_a_sound_bundle_passes_and_its_manifest_says_so(workshop: Any):
    report = workshop.verify()
    assert report.failures == ""
    assert report.passed
    # The first two are for rounded variants, the last for bundles with engines.
    assert set(report.checks) == set(GATES) - {"range", "rounding", "engines"}
    noted = load_bundle(workshop.folder).manifest["parity"]["fp32"]
    assert noted["passed"]
    assert noted["how"] == "ONNX Runtime on cpu"
    assert noted["gates"]["drawing"] == "2 passed"
    shown = CliRunner().invoke(app, ["inspect", str(workshop.folder)]).stdout.splitlines()
    [at] = [i for i, line in enumerate(shown) if line.split() == ["variant", "gate", "result"]]
    assert shown[at + 1].split()[:3] == ["fp32", "all", "passed,"]
    assert ["drawing", "2", "passed"] in [line.split() for line in shown]
    assert ["range", "nothing", "to", "check"] in [line.split() for line in shown]


def test_single_gates_record_nothing(workshop: Any):
    workshop.verify("sizes")
    assert load_bundle(workshop.folder).manifest["parity"] == {}


def test_weights_are_hashed_before_anything_is_compared(workshop: Any):
    """One bit of one weight: too little for any gate that compares numbers."""
    [name, *_] = load_bundle(workshop.folder).manifest["variants"]["fp32"]["weights"]
    file = workshop.folder / name
    content = bytearray(file.read_bytes())
    content[-4] ^= 1  # the last float32's lowest bit
    file.write_bytes(content)
    with pytest.raises(BundleError, match="its hash differs"):
        workshop.verify("graphs")


def test_a_selected_gate_that_does_not_apply_is_an_error(workshop: Any):
    workshop.claim(quantization=INT8)
    report = workshop.verify("sizes", "answer")
    assert not report.passed
    assert report.failures == "fp32: nothing to check"
    assert list(report.checks) == ["sizes", "answer"]


def test_gates_that_had_nothing_to_check_are_listed(workshop: Any, monkeypatch: pytest.MonkeyPatch):
    for name in list(GATES):
        if name not in ("sizes", "engines"):
            monkeypatch.delitem(GATES, name)
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "the model"])
    assert "nothing to check: engines\n" in run.stdout
    assert load_bundle(workshop.folder).manifest["parity"]["fp32"]["nothing_to_check"] == ["engines"]


def test_what_ends_a_gate_is_a_failure_with_a_traceback_to_ask_for(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
):
    def typo(target: Any) -> list[Any]:
        return target.no_such_thing

    monkeypatch.setitem(GATES, "sizes", typo)
    command = ["verify", str(workshop.folder), "--against", "the model", "--gate", "sizes"]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 1
    assert "AttributeError" in run.stdout
    assert "in typo" not in run.output
    run = CliRunner().invoke(app, ["--traceback", *command])
    assert run.exit_code == 1
    assert "in typo" in run.stderr


def test_what_was_found_is_printed_where_it_cannot_be_recorded(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
):
    for name in list(GATES):
        if name != "sizes":
            monkeypatch.delitem(GATES, name)

    def read_only(*_: Any) -> None:
        raise OSError(30, "Read-only file system")  # root may write anywhere, so no permissions are taken

    monkeypatch.setattr("janus_export.bundle.bundle.write_manifest", read_only)
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "the model"])
    assert run.exit_code == 2
    assert "fp32: passed" in run.stdout
    assert "Read-only file system" in run.stderr
    assert "Make the folder writable" in run.stderr


def misspelt(model: ir.Model) -> None:
    first(model, "Gemm").op_type = "Gemmm"


def contrib(model: ir.Model) -> None:
    model.opset_imports["com.microsoft"] = 1
    first(model, "Gelu").domain = "com.microsoft"


def unread(model: ir.Model) -> None:
    model.graph.inputs.append(ir.val("extra", ir.DataType.FLOAT, [1]))


def unmasked(model: ir.Model) -> None:
    first(model, "Attention").replace_input_with(3, None)


def causal(model: ir.Model) -> None:
    first(model, "Attention").attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def many_outputs(model: ir.Model) -> None:
    node = first(model, "Attention")
    node.resize_outputs(3)
    node.outputs[1].name, node.outputs[2].name = "key_out", "value_out"


def copied_cache(model: ir.Model) -> None:
    """Let one cache go out as a copy of what came in."""
    present = first(model, "TensorScatter").outputs[0]
    at = next(i for i, value in enumerate(model.graph.outputs) if value is present)
    copy = ir.node("Identity", [present.producer().inputs[0]])
    present.name, copy.outputs[0].name = "unused", present.name
    copy.outputs[0].type, copy.outputs[0].shape = present.type, present.shape
    model.graph.append(copy)
    model.graph.outputs[at] = copy.outputs[0]


def flat_cache(model: ir.Model) -> None:
    past = next(value for value in model.graph.inputs if value.name == "past_key_0")
    past.shape = ir.Shape(past.shape[1:])


def scaled_cache(model: ir.Model) -> None:
    """Let a step change all cache positions of a layer a little."""
    present = first(model, "TensorScatter").outputs[0]
    at = next(i for i, value in enumerate(model.graph.outputs) if value is present)
    half = ir.node("Constant", [], {"value": ir.tensor(np.float32(0.5))})
    product = ir.node("Mul", [present, half.outputs[0]])
    present.name, product.outputs[0].name = "inner", present.name
    product.outputs[0].type, product.outputs[0].shape = present.type, present.shape
    model.graph.extend([half, product])
    model.graph.outputs[at] = product.outputs[0]


def all_seen(model: ir.Model) -> None:
    """Let every position attend to the whole cache."""
    node = first(model, "Attention")
    mask = node.inputs[3]
    inverse = ir.node("Not", [mask])
    everything = ir.node("Or", [mask, inverse.outputs[0]])
    node.replace_input_with(3, everything.outputs[0])
    model.graph.insert_before(node, [inverse, everything])


@pytest.mark.parametrize(
    ("gate", "graph", "change", "said"),
    [
        ("checker", "sample_image", misspelt, "Gemmm"),
        ("lint", "sample_image", contrib, "non-standard operators: com.microsoft::Gelu"),
        ("lint", "decode_image", unread, "unused inputs: extra"),
        ("lint", "backbone", unmasked, "attention without an explicit mask"),
        ("lint", "backbone", causal, "has is_causal set"),
        ("lint", "backbone", many_outputs, "has 3 outputs"),
        ("lint", "backbone", copied_cache, "is not written by TensorScatter from past_key_0"),
        ("lint", "backbone", flat_cache, "past_key_0 has 3 dimensions"),
        ("graphs", "understand", ("layers.0.weight", 0.1), "understand"),
        ("graphs", "embed", ("weight", 0.1), "embed"),
        ("graphs", "sample_text", ("weight", 1), "sample_text: ids"),
        ("graphs", "sample_image", ("vision_head.weight", 1), "sample_image: codes"),
        ("graphs", "sample_image", ("adaptor.layers.0.weight", 0.1), "sample_image: x"),
        ("graphs", "embed_codes", ("adaptor.layers.0.weight", 0.1), "embed_codes"),
        ("graphs", "decode_image", ("weight", 0.3), "decode_image: pixels"),
        ("graphs", "tokenize_image", ("weight", 1), "tokenize_image"),
        ("graphs", "decode_image", misspelt, "Gemmm"),
        ("rows", "backbone", ("q_proj.weight", 0.01), "variable-length rows: steps"),
        ("rows", "backbone", all_seen, "variable-length rows, in chunks"),
        ("cache", "backbone", all_seen, "unused cache positions: they change"),
        ("cache", "backbone", scaled_cache, "cache positions other than the written one"),
        ("cache", "backbone", copied_cache, "the written cache position: unchanged"),
        ("answer", "sample_text", ("weight", 1), "greedy answers: tokens"),
        ("answer", "backbone", ("q_proj.weight", 1), "greedy answers: tokens"),
        ("drawing", "sample_image", ("vision_head.weight", 1), "a whole drawing: ids"),
        ("drawing", "decode_image", ("weight", 0.3), "a whole drawing: pixels"),
    ],
)
def test_a_gate_finds_what_it_is_there_to_find(
    workshop: Any, gate: str, graph: str, change: Change | tuple[str, float], said: str
):
    if change is misspelt and graph == "decode_image":
        change = lambda model: setattr(first(model, "Conv"), "op_type", "Gemmm")  # noqa: E731
    if isinstance(change, tuple):  # noise, on a weight
        workshop.shift(graph, *change)
    else:
        workshop.graph(graph, change)
    report = workshop.verify(gate)
    assert not report.passed
    assert said in report.failures


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", 321), ("sizes", {"codes": 63}), ("context", 4096), ("pad_id", 0), ("hidden_size", 65)],
)
def test_sizes_are_the_models(workshop: Any, name: str, value: Any):
    workshop.note(lambda manifest: manifest["model"].update({name: value}))
    assert f"{name}: {value}" in workshop.verify("sizes").failures


def test_shapes_are_the_models(workshop: Any):
    def change(manifest: dict[str, Any]) -> None:
        past = next(one for one in manifest["graphs"]["backbone"]["inputs"] if one["name"] == "past_value_1")
        past["shape"][1] = 4

    workshop.note(change)
    assert "past_value_1" in workshop.verify("sizes").failures


def test_the_command_prints_and_records(workshop: Any):
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "the model", "--json"])
    assert run.exit_code == 0, run.output
    [report] = json.loads(run.stdout)
    assert report["passed"]
    assert set(report["gates"]["cache"][0]) == {"name", "passed", "measured", "expected"}
    workshop.shift("decode_image", "weight", 0.3)
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "x", "--gate", "drawing"])
    assert run.exit_code == 1
    assert "FAILED" in run.stdout
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "x", "--gate", "drawin"])
    assert "Did you mean 'drawing'?" in run.output
