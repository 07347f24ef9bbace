"""Every gate that computes fails on NaN and infinity, at any position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from janus_export.bundle.bundle import load_bundle
from janus_export.reference.compare import compare, compare_directions, distance, magnitude, relative_error
from janus_modular.foreign import sha256
from janus_modular.safetensors_headers import byte_ranges

NAN, INF = float("nan"), float("inf")
HALF = {"dtype": "float16"}
INT8 = {"bits": 8, "block_size": 32, "form": "nbits", "graphs": ["backbone"], "quantized": [], "skipped": {}}

with_reference = pytest.mark.usefixtures("one_reference")


def put(name: str, value: float) -> Callable[[ir.Model], None]:
    """Set one number of the first weight whose name ends so."""

    def change(model: ir.Model) -> None:
        [weight, *_] = [one for key, one in model.graph.initializers.items() if key.endswith(name)]
        array = weight.const_value.numpy().copy()
        array.reshape(-1)[0] = value
        weight.const_value = ir.Tensor(array, name=weight.name)

    return change


@with_reference
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    ("gate", "graph", "weight", "claims"),
    [
        ("graphs", "understand", "layers.0.weight", {}),
        ("graphs", "sample_image", "vision_head.weight", {}),
        ("rows", "backbone", "q_proj.weight", {}),
        ("cache", "backbone", "v_proj.weight", {}),
        ("range", "backbone", "up_proj.weight", HALF),
        ("rounding", "backbone", "up_proj.weight", HALF),
        ("rounding", "backbone", "up_proj.weight", {"quantization": INT8}),
        ("answer", "backbone", "norm.weight", {}),
        ("drawing", "sample_image", "vision_head.weight", {}),
    ],
)
def test_a_gate_fails_on_what_is_not_finite(
    workshop: Any, gate: str, graph: str, weight: str, claims: dict[str, Any], value: float
) -> None:
    if claims:
        workshop.claim(**claims)
    workshop.graph(graph, put(weight, value))
    report = workshop.verify(gate)
    assert not report.passed, report.checks


@with_reference
@pytest.mark.parametrize("value", [NAN, -INF])
def test_weights_that_are_not_finite_are_named(workshop: Any, value: float) -> None:
    weight = "backbone.model.model.norm.weight"
    files = load_bundle(workshop.folder).manifest["variants"]["fp32"]["weights"]
    [name] = [one for one in files if weight in byte_ranges(workshop.folder / one)]
    file: Path = workshop.folder / name
    offset, _ = byte_ranges(file)[weight]
    content = bytearray(file.read_bytes())
    content[offset : offset + 4] = np.float32(value).tobytes()
    file.write_bytes(content)

    def sign(manifest: dict[str, Any]) -> None:
        manifest["sha256"][name], manifest["bytes"][name] = sha256(file), file.stat().st_size

    workshop.note(sign)
    failures = workshop.verify("lint").failures
    assert "weights that are not finite: backbone.model.model.norm.weight" in failures


ROWS = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


def with_one(value: float) -> np.ndarray:
    array = ROWS.copy()
    array[1, 2] = value
    return array


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["the graph", "torch", "both"])
@pytest.mark.parametrize("kind", ["exact", "half", 8, 4])
def test_no_comparison_passes_what_is_not_finite(value: float, where: str, kind: str | int) -> None:
    got = ROWS if where == "torch" else with_one(value)
    want = ROWS if where == "the graph" else with_one(value)
    with np.errstate(invalid="ignore"):
        assert not compare("it", kind, got, want).passed
        assert kind == "exact" or not compare_directions("it", kind, got, want).passed
        assert distance(got, want) == INF
        assert relative_error(got, want) == INF


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_largest_of_what_is_not_finite_is_infinite(value: float) -> None:
    assert magnitude(with_one(value)) == INF
    assert magnitude(ROWS) == 1
    assert magnitude(np.zeros(0, np.float32)) == 0
