"""Verification of precisions below float32: every graph is compared, within the error of its rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from janus_export.bundle.bundle import load_bundle
from janus_export.gates.quantized import activations, compare_drawing
from janus_export.reference.compare import compare_outputs
from janus_export.reference.recording import BackboneCall, GraphCall, Run
from janus_export.reference.target import Reference, VerificationTarget
from janus_export.runtimes.ort.runtime import OnnxConfig, OnnxRuntime
from janus_modular import GraphSpec

pytestmark = pytest.mark.usefixtures("one_reference")

INT8 = {"bits": 8, "block_size": 32, "form": "nbits", "graphs": ["backbone"], "quantized": [], "skipped": {}}


@pytest.mark.parametrize(
    ("claimed", "noise", "said"),
    [
        ({"dtype": "float16"}, 0.05, ">= 0.999"),
        ({"quantization": INT8}, 0.1, ">= 0.99"),
        ({"quantization": {**INT8, "bits": 4}}, 1, ">= 0.9"),
    ],
    ids=["half", "8 bits", "4 bits"],
)
def test_rounded_variants_must_say_nearly_the_same(
    workshop: Any, claimed: dict[str, Any], noise: float, said: str
):
    workshop.claim(**claimed)
    assert workshop.verify("rounding").passed
    workshop.shift("backbone", "o_proj.weight", noise)
    report = workshop.verify("rounding")
    assert not report.passed
    assert said in report.checks["rounding"][0].expected


def test_where_no_choice_is_clear_the_cosine_decides(workshop: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("janus_export.gates.quantized.CLEAR_MARGIN", 1e9)  # nats
    workshop.claim(quantization={**INT8, "bits": 4})
    assert workshop.verify("rounding").passed
    workshop.shift("backbone", "o_proj.weight", 1)
    assert "answers: cosine of logits" in workshop.verify("rounding").failures


def test_drawings_are_compared_by_what_the_path_itself_chooses():
    """Of states that differ only in what the path reads, and that it takes three rows of at once."""

    def choose(noise: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (hidden[:, :1] * torch.arange(8.0) - noise.log()).argmax(-1), hidden

    states, rng = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32), np.random.default_rng(1)
    lengths = np.ones(3, np.int64)
    run = Run(8, backbone=[BackboneCall("step", (states[:3],), lengths, lengths + 1, states[:3])])
    run.calls = [
        GraphCall("choose", (rng.standard_exponential((3, 8), np.float32), states[:3]), (), 1)
        for _ in range(9)
    ]
    graphs = {"choose": GraphSpec("choose", choose, (), (), "sample")}
    target: Any = SimpleNamespace(backbone_precision=8, reference=SimpleNamespace(graphs=graphs))
    assert all(check.passed for check in compare_drawing(target, "drawings", states, states, run))
    other = states.copy()
    other[:, 0] *= -1  # 2 of 512 parts of the squared length: a cosine of 0.996
    cosine, choices = compare_drawing(target, "drawings", other, states, run)
    assert cosine.passed
    assert not choices.passed


@pytest.mark.parametrize("variant", ["fp16", "trt-int4"])  # whose backbone alone is rounded
@pytest.mark.parametrize(
    ("graph", "change", "said"),
    [
        ("decode_image", (0,), "decode_image: off by"),
        ("understand", (0.9,), "understand: off by"),
        ("embed", (0.9,), "embed: off by"),
        ("sample_text", ("weight", 1), "sample_text: ids"),
        ("sample_image", ("vision_head.weight", 1), "sample_image: codes"),
        ("sample_image", (0.9,), "sample_image: x"),
        ("tokenize_image", ("weight", 1), "tokenize_image"),
    ],
)
def test_every_graph_of_half_precision_is_compared(
    tiny_gpu_bundle: Path,
    workshop_of: Callable[..., Any],
    variant: str,
    graph: str,
    change: tuple[float] | tuple[str, float],
    said: str,
):
    workshop = workshop_of(tiny_gpu_bundle, variant)
    (workshop.shift if len(change) == 2 else workshop.scale)(graph, *change)
    lines = workshop.verify("graphs").failures.splitlines()
    assert lines
    assert all(line.startswith(graph) for line in lines)
    assert any(line.startswith(said) for line in lines)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_graph_that_is_rounded_is_compared(workshop: Any, bits: int):
    workshop.claim(quantization={**INT8, "bits": bits, "graphs": ["backbone", "understand", "decode_image"]})
    assert workshop.verify("graphs").passed
    workshop.scale("decode_image", 0.3)
    workshop.scale("understand", 0.3)
    assert [line.split(":")[0] for line in workshop.verify("graphs").failures.splitlines()] == [
        "understand",
        "decode_image",
    ]


def test_no_choice_in_common_is_no_agreement():
    none, some = np.zeros(4, np.int64), np.ones(4, np.int64)
    x = np.zeros((4, 2), np.float32)
    checks = list(compare_outputs("choose", "sample", ["ids", "x"], "exact", [(none, x)], [(some, x)]))
    assert [check.passed for check in checks] == [False, False]


def test_what_half_precision_cannot_hold_is_found(workshop: Any):
    workshop.claim(dtype="float16")
    assert workshop.verify("range").passed

    def enlarge(model: ir.Model) -> None:
        [value, *_] = [v for key, v in model.graph.initializers.items() if key.endswith("up_proj.weight")]
        value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1e6), name=value.name)

    workshop.graph("backbone", enlarge)
    assert "largest number inside the backbone" in workshop.verify("range").failures


def test_the_range_is_that_of_float32_also_where_a_gpu_runs_the_halves(
    tiny_gpu_bundle: Path, reference: Reference
):
    with VerificationTarget.of(
        load_bundle(tiny_gpu_bundle), "fp16", reference, runtime="onnx", device="cpu"
    ) as target:
        [on_cpu] = activations(target)
        run = target.runtime.run
        target.runtime = SimpleNamespace(  # as a GPU's: the graphs of the bundle themselves
            run=lambda name, *given: run(name, *given).astype(np.float16),
            graph=OnnxRuntime(OnnxConfig("fp16"), tiny_gpu_bundle).graph,
            bundle=target.bundle,
        )
        [on_gpu] = activations(target)
    assert on_gpu.passed
    assert float(on_gpu.measured.split()[0]) == pytest.approx(float(on_cpu.measured.split()[0]), rel=1e-2)


def test_a_matrix_that_was_left_unrounded_needs_a_reason(workshop: Any):
    workshop.claim(quantization=INT8)
    assert (
        "unquantised matrices without a recorded reason: backbone.model.model.layers.0"
        in workshop.verify("lint").failures
    )
    matrices = [
        f"backbone.model.model.layers.{layer}.{name}_proj.weight"
        for layer in range(2)
        for name in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    ]
    workshop.claim(quantization={**INT8, "skipped": dict.fromkeys(matrices, "as a test")})
    assert workshop.verify("lint").passed


def test_half_precision_on_a_cpu_is_recorded_as_what_it_is(workshop: Any):
    workshop.claim(dtype="float16")
    assert "in float32 with the variant's rounded weights" in workshop.verify("sizes").how
