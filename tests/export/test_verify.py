"""Every gate passes a sound bundle, and fails one in which something was changed that it is there to find."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

from janus_export.bundle import load_bundle, write_manifest
from janus_export.errors import BundleError
from janus_export.verify import GATES, Report, verify
from janus_export.verify_agreement import compare_part
from janus_export.verify_rounded import compare_drawing
from janus_modular.cli.app import app

Change = Callable[[ir.Model], None]


pytestmark = pytest.mark.usefixtures("one_reference")


class Workshop:
    """A copy of the bundle, to be changed."""

    def __init__(self, folder: Path, variant: str = "fp32") -> None:
        self.folder, self.variant = folder, variant

    def note(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the manifest."""
        manifest = json.loads((self.folder / "manifest.json").read_text())
        change(manifest)
        write_manifest(self.folder, manifest)

    def graph(self, name: str, change: Change) -> None:
        """Change a graph, and its hash with it, as if it had been exported so."""
        path = self.folder / load_bundle(self.folder).manifest["variants"][self.variant]["files"][name]
        model = ir.load(path)
        change(model)
        ir.save(model, path)

        def rehash(manifest: dict[str, Any]) -> None:
            manifest["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest["bytes"][path.name] = path.stat().st_size

        self.note(rehash)

    def claim(self, **what: Any) -> None:
        """Let the variant say that it is rounded, in some way."""
        self.note(lambda manifest: manifest["variants"]["fp32"].update(what))

    def verify(self, *gates: str) -> Report:
        [report] = verify(self.folder, "the model", variants=[self.variant], gates=gates)
        return report


@pytest.fixture
def workshop(tiny_bundle: Path, tmp_path: Path) -> Workshop:
    """fp32 alone, whatever else the bundle has."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    copy = Workshop(folder)

    def only(manifest: dict[str, Any]) -> None:
        manifest["variants"] = {"fp32": manifest["variants"]["fp32"]}

    copy.note(only)
    return copy


def shifted(name: str, by: float) -> Change:
    """Add noise of that size to the first weight whose name ends so."""

    def change(model: ir.Model) -> None:
        values = model.graph.initializers
        [value, *_] = [value for key, value in values.items() if key.endswith(name)]
        weight = value.const_value.numpy()
        noise = np.random.default_rng(0).normal(0, by, weight.shape).astype(weight.dtype)
        value.const_value = ir.Tensor(weight + noise, name=value.name)

    return change


def first(model: ir.Model, op: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op)


def test_a_sound_bundle_passes_and_its_manifest_says_so(workshop: Workshop):
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


def test_single_gates_record_nothing(workshop: Workshop):
    workshop.verify("sizes")
    assert load_bundle(workshop.folder).manifest["parity"] == {}


def test_weights_are_hashed_before_anything_is_compared(workshop: Workshop):
    """One bit of one weight: too little for any gate that compares numbers."""
    [name] = load_bundle(workshop.folder).manifest["variants"]["fp32"]["weights"]
    file = workshop.folder / name
    content = bytearray(file.read_bytes())
    content[-4] ^= 1  # the last float32's lowest bit
    file.write_bytes(content)
    with pytest.raises(BundleError, match="its hash is another"):
        workshop.verify("graphs")


def test_a_gate_that_is_asked_for_must_have_something_to_check(workshop: Workshop):
    workshop.claim(quantisation=INT8)
    report = workshop.verify("sizes", "answer")
    assert not report.passed
    assert report.failures == "fp32: nothing to check"
    assert list(report.checks) == ["sizes", "answer"]


def test_gates_that_had_nothing_to_check_are_listed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    for name in list(GATES):
        if name not in ("sizes", "engines"):
            monkeypatch.delitem(GATES, name)
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "the model"])
    assert "nothing to check: engines\n" in run.stdout
    assert load_bundle(workshop.folder).manifest["parity"]["fp32"]["nothing_to_check"] == ["engines"]


def test_what_ends_a_gate_is_a_failure_with_a_traceback_to_ask_for(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    def typo(subject: Any) -> list[Any]:
        return subject.no_such_thing

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
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
):
    for name in list(GATES):
        if name != "sizes":
            monkeypatch.delitem(GATES, name)

    def read_only(*_: Any) -> None:
        raise OSError(30, "Read-only file system")  # root may write anywhere, so no permissions are taken

    monkeypatch.setattr("janus_export.bundle.write_manifest", read_only)
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
    """Let a step change all slots of a layer a little."""
    present = first(model, "TensorScatter").outputs[0]
    at = next(i for i, value in enumerate(model.graph.outputs) if value is present)
    half = ir.node("Constant", [], {"value": ir.tensor(np.float32(0.5))})
    product = ir.node("Mul", [present, half.outputs[0]])
    present.name, product.outputs[0].name = "inner", present.name
    product.outputs[0].type, product.outputs[0].shape = present.type, present.shape
    model.graph.extend([half, product])
    model.graph.outputs[at] = product.outputs[0]


def all_seen(model: ir.Model) -> None:
    """Let everybody see every slot."""
    node = first(model, "Attention")
    mask = node.inputs[3]
    inverse = ir.node("Not", [mask])
    everything = ir.node("Or", [mask, inverse.outputs[0]])
    node.replace_input_with(3, everything.outputs[0])
    model.graph.insert_before(node, [inverse, everything])


@pytest.mark.parametrize(
    ("gate", "graph", "change", "said"),
    [
        ("checker", "image_next", misspelt, "Gemmm"),
        ("lint", "image_next", contrib, "operators beyond the standard: com.microsoft::Gelu"),
        ("lint", "draw", unread, "inputs that nothing reads: extra"),
        ("lint", "backbone", unmasked, "attention without a mask of its own"),
        ("lint", "backbone", causal, "is causal by itself"),
        ("lint", "backbone", many_outputs, "has 3 outputs"),
        ("lint", "backbone", copied_cache, "is not past_key_0 with slots written"),
        ("lint", "backbone", flat_cache, "past_key_0 has 3 dimensions"),
        ("graphs", "understand", shifted("layers.0.weight", 0.1), "understand"),
        ("graphs", "embed", shifted("weight", 0.1), "embed"),
        ("graphs", "text_next", shifted("weight", 1), "text_next: choices"),
        ("graphs", "image_next", shifted("vision_head.weight", 1), "image_next: choices"),
        ("graphs", "image_next", shifted("adaptor.layers.0.weight", 0.1), "image_next: embeddings"),
        ("graphs", "draw", shifted("weight", 0.3), "draw: pixels"),
        ("graphs", "tokenize_image", shifted("weight", 1), "tokenize_image"),
        ("graphs", "draw", misspelt, "Gemmm"),
        ("rows", "backbone", shifted("q_proj.weight", 0.01), "ragged rows: steps"),
        ("rows", "backbone", all_seen, "ragged rows, in chunks"),
        ("cache", "backbone", all_seen, "unseen slots: they change"),
        ("cache", "backbone", scaled_cache, "slots beside the one that is written"),
        ("cache", "backbone", copied_cache, "the slot that is written: left as it was"),
        ("answer", "text_next", shifted("weight", 1), "greedy answers: tokens"),
        ("answer", "backbone", shifted("q_proj.weight", 1), "greedy answers: tokens"),
        ("drawing", "image_next", shifted("vision_head.weight", 1), "a whole drawing: codes"),
        ("drawing", "draw", shifted("weight", 0.3), "a whole drawing: pixels"),
    ],
)
def test_a_gate_finds_what_it_is_there_to_find(
    workshop: Workshop, gate: str, graph: str, change: Change, said: str
):
    if change is misspelt and graph == "draw":
        change = lambda model: setattr(first(model, "Conv"), "op_type", "Gemmm")  # noqa: E731
    workshop.graph(graph, change)
    report = workshop.verify(gate)
    assert not report.passed
    assert said in report.failures


@pytest.mark.parametrize(
    ("name", "value"), [("vocab", 321), ("codes", 63), ("context", 4096), ("pad", 0), ("width", 65)]
)
def test_sizes_are_the_models(workshop: Workshop, name: str, value: int):
    workshop.note(lambda manifest: manifest["model"].update({name: value}))
    assert f"{name}: {value}" in workshop.verify("sizes").failures


def test_shapes_are_the_models(workshop: Workshop):
    def change(manifest: dict[str, Any]) -> None:
        past = next(one for one in manifest["graphs"]["backbone"]["inputs"] if one["name"] == "past_value_1")
        past["shape"][1] = 4

    workshop.note(change)
    assert "past_value_1" in workshop.verify("sizes").failures


INT8 = {"bits": 8, "form": "nbits", "graphs": ["backbone"], "rounded": [], "kept": {}}


@pytest.mark.parametrize(
    ("claimed", "noise", "said"),
    [
        ({"dtype": "float16"}, 0.05, ">= 0.999"),
        ({"quantisation": INT8}, 0.1, ">= 0.99"),
        ({"quantisation": {**INT8, "bits": 4}}, 1, ">= 0.9"),
    ],
    ids=["half", "8 bits", "4 bits"],
)
def test_rounded_variants_must_say_nearly_the_same(
    workshop: Workshop, claimed: dict[str, Any], noise: float, said: str
):
    workshop.claim(**claimed)
    assert workshop.verify("rounding").passed
    workshop.graph("backbone", shifted("o_proj.weight", noise))
    report = workshop.verify("rounding")
    assert not report.passed
    assert said in report.checks["rounding"][0].wanted


def test_where_no_choice_is_clear_the_cosine_decides(workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("janus_export.verify_rounded.CLEAR", 1e9)  # nats
    workshop.claim(quantisation={**INT8, "bits": 4})
    assert workshop.verify("rounding").passed
    workshop.graph("backbone", shifted("o_proj.weight", 1))
    assert "answers: cosine of logits" in workshop.verify("rounding").failures


def test_drawings_are_compared_by_what_the_path_itself_chooses():
    """Of a path that has no part called a head, and of states that differ only in what it reads."""

    def image_next(hidden: torch.Tensor, noise: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return (hidden[:, :1] * torch.arange(8.0) - noise.log()).argmax(-1), hidden

    path = SimpleNamespace(sizes={"codes": 8}, parts=lambda: {"image_next": image_next})
    subject = SimpleNamespace(rounded_to=8, reference=SimpleNamespace(model=SimpleNamespace(generation=path)))
    states = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    assert all(check.passed for check in compare_drawing(subject, "drawings", states, states))
    other = states.copy()
    other[:, 0] *= -1  # 2 of 512 parts of the squared length: a cosine of 0.996
    cosine, choices = compare_drawing(subject, "drawings", other, states)
    assert cosine.passed
    assert not choices.passed


def scaled(by: float) -> Change:
    """Multiply what a graph gives last; of pixels before they become integers."""

    def change(model: ir.Model) -> None:
        value = model.graph.outputs[-1]
        if value.dtype == ir.DataType.UINT8:
            value = value.producer().inputs[0]
        users = [(node, place) for node, place in value.uses()]
        factor = ir.node("Constant", [], {"value": ir.tensor(np.array(by, value.dtype.numpy()))})
        product = ir.node("Mul", [value, factor.outputs[0]])
        product.outputs[0].type, product.outputs[0].shape = value.type, value.shape
        if users:
            model.graph.insert_after(value.producer(), [factor, product])
            for node, place in users:
                node.replace_input_with(place, product.outputs[0])
        else:
            value.name, product.outputs[0].name = "inner", value.name
            model.graph.extend([factor, product])
            model.graph.outputs[-1] = product.outputs[0]

    return change


@pytest.mark.parametrize("variant", ["fp16", "trt-int4"])  # whose backbone alone is rounded
@pytest.mark.parametrize(
    ("graph", "change", "said"),
    [
        ("draw", scaled(0), "draw: off by"),
        ("understand", scaled(0.9), "understand: off by"),
        ("embed", scaled(0.9), "embed: off by"),
        ("text_next", shifted("weight", 1), "text_next: choices"),
        ("image_next", shifted("vision_head.weight", 1), "image_next: choices"),
        ("image_next", scaled(0.9), "image_next: embeddings"),
        ("tokenize_image", shifted("weight", 1), "tokenize_image"),
    ],
)
def test_every_graph_of_half_precision_is_compared(
    tiny_gpu_bundle: Path, tmp_path: Path, variant: str, graph: str, change: Change, said: str
):
    workshop = Workshop(shutil.copytree(tiny_gpu_bundle, tmp_path / "bundle"), variant)
    workshop.graph(graph, change)
    lines = workshop.verify("graphs").failures.splitlines()
    assert lines
    assert all(line.startswith(graph) for line in lines)
    assert any(line.startswith(said) for line in lines)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_graph_that_is_rounded_is_compared(workshop: Workshop, bits: int):
    workshop.claim(quantisation={**INT8, "bits": bits, "graphs": ["backbone", "understand", "draw"]})
    assert workshop.verify("graphs").passed
    workshop.graph("draw", scaled(0.3))
    workshop.graph("understand", scaled(0.3))
    assert [line.split(":")[0] for line in workshop.verify("graphs").failures.splitlines()] == [
        "understand",
        "draw",
    ]


def test_no_choice_in_common_is_no_agreement():
    none, some = np.zeros(4, np.int64), np.ones(4, np.int64)
    x = np.zeros((4, 2), np.float32)
    checks = list(compare_part("text_next", "exact", [(none, x)], [(some, x)]))
    assert [check.passed for check in checks] == [False, False]


def test_what_half_precision_cannot_hold_is_found(workshop: Workshop):
    workshop.claim(dtype="float16")
    assert workshop.verify("range").passed

    def enlarge(model: ir.Model) -> None:
        [value, *_] = [v for key, v in model.graph.initializers.items() if key.endswith("up_proj.weight")]
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1e6), name=value.name)

    workshop.graph("backbone", enlarge)
    assert "largest number inside the backbone" in workshop.verify("range").failures


def test_a_matrix_that_was_left_unrounded_needs_a_reason(workshop: Workshop):
    workshop.claim(quantisation=INT8)
    assert "unexplained: backbone.model.model.layers.0" in workshop.verify("lint").failures
    matrices = [
        f"backbone.model.model.layers.{layer}.{name}_proj.weight"
        for layer in range(2)
        for name in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    ]
    workshop.claim(quantisation={**INT8, "kept": dict.fromkeys(matrices, "as a test")})
    assert workshop.verify("lint").passed


def test_the_command_prints_and_records(workshop: Workshop):
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "the model", "--json"])
    assert run.exit_code == 0, run.output
    [report] = json.loads(run.stdout)
    assert report["passed"]
    assert set(report["gates"]["cache"][0]) == {"what", "passed", "found", "wanted"}
    workshop.graph("draw", shifted("weight", 0.3))
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "x", "--gate", "drawing"])
    assert run.exit_code == 1
    assert "FAILED" in run.stdout
    run = CliRunner().invoke(app, ["verify", str(workshop.folder), "--against", "x", "--gate", "drawin"])
    assert "Did you mean 'drawing'?" in run.output


def test_half_precision_on_a_cpu_is_recorded_as_what_it_is(workshop: Workshop):
    workshop.claim(dtype="float16")
    assert "in float32 with the variant's rounded weights" in workshop.verify("sizes").how
