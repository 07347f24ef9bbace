"""Images decoded from NaN or infinity are errors, before the values are clipped to pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from typer.testing import CliRunner

from janus_export.bundle.contract import MAGNITUDE, check_magnitude
from janus_export.onnx_export.pixel_magnitude import add_magnitude
from janus_modular import NotFiniteError
from janus_modular.cli.app import app
from janus_modular.janus import Janus

LARGE = 6e4
"""A weight that fits into fp16, while sums of a few products with it do not."""


def overflow(model: ir.Model) -> None:
    """Let the decoder's convolutions have sums that fp16 does not hold, of weights that it does.

    Of all of them: on a CPU, ONNX Runtime computes in float32 what no operator between keeps in fp16.
    """
    for name, value in model.graph.initializers.items():
        if ".decoder." in name and len(value.shape) == 4:
            signs = np.where(value.const_value.numpy() < 0, -1, 1)
            value.const_value = ir.Tensor((LARGE * signs).astype(np.float16), name=name)


@pytest.fixture
def overflowing(workshop_of: Any, tiny_gpu_bundle: Path, build_engines: Any) -> Path:
    """A bundle in fp16 whose image decoder overflows, with stand-in engines."""
    copy = workshop_of(tiny_gpu_bundle, "fp16")
    copy.graph("decode_image", overflow)
    build_engines(copy.folder, "fp16", "tensorrt")
    return copy.folder


@pytest.mark.parametrize("runtime", ["onnx", "tensorrt"])
@pytest.mark.usefixtures("machine")
def test_a_decoder_that_overflows_is_refused(overflowing: Path, runtime: str):
    device = "cpu" if runtime == "onnx" else "cuda"
    janus = Janus.from_pretrained(
        overflowing, runtime=runtime, variant="fp16", device=device, allow_failed=True
    )
    with pytest.raises(
        NotFiniteError, match="'decode_image' decoded values that are NaN or infinite in 2 of 2"
    ):
        janus.draw("a", 2, guidance=1.0, seed=1)


def test_the_command_line_says_so_and_writes_no_image(overflowing: Path, tmp_path: Path):
    file = tmp_path / "a.png"
    line = ["draw", str(overflowing), "a", "--variant", "fp16", "--device", "cpu", "-o", str(file)]
    line += ["--allow-failed"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2, done.output
    assert "NaN or infinite in 4 of 4 images" in " ".join(done.output.split())
    assert not file.exists()


@pytest.mark.usefixtures("machine")
def test_engines_that_decode_several_times_check_every_image(overflowing: Path):
    runtime = Janus.from_pretrained(
        overflowing, runtime="tensorrt", variant="fp16", allow_failed=True
    ).runtime
    codes = np.arange(5 * 16).reshape(5, 16) % 64  # the engine takes four images at once
    with pytest.raises(NotFiniteError, match="in 5 of 5 images"):
        runtime.run("decode_image", codes)
    session = runtime.open(32)
    pixels = session.run("decode_image", codes)
    with pytest.raises(NotFiniteError, match="in 5 of 5 images"):
        session.to_host(pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_torch_refuses_what_its_decoder_gives(tiny_checkpoint: Path, value: float):
    janus = Janus.from_pretrained(tiny_checkpoint)
    [*_, bias] = janus.runtime.model.generation.tokenizer.decoder.parameters()
    bias.data.fill_(value)
    with pytest.raises(NotFiniteError, match="NaN or infinities"):
        janus.draw("a", guidance=1.0)


ENDS = {
    "clipped": ["y = Clip(x, low, high)"],
    "clipped twice": ["a = Tanh(x)", "b = Add(a, low)", "y = Clip(b, low, high)"],
    "not clipped": ["y = Mul(x, high)"],
    "clipped as torch does": ["a = Max(x, low)", "y = Min(a, high)"],
    "integers before": ["a = Clip(x, low, high)", "b = Cast<to = 7>(a)", "y = Mul(b, b)"],
    "widened from half precision": ["a = Cast<to = 10>(x)", "b = Cast<to = 1>(a)", "y = Clip(b, low, high)"],
    "arranged": [
        "a = Clip(x, low, high)",
        "b = Transpose<perm = [1, 0]>(a)",
        "y = Transpose<perm = [1, 0]>(b)",
    ],
    "without the first axis": ["a = Reshape(x, all)", "b = Clip(a, low, high)", "y = Reshape(b, back)"],
}
"""Ends of decoders, from their values x (N, 4) to y, which is cast to uint8."""


def run(lines: list[str], given: np.ndarray) -> list[np.ndarray]:
    """Return pixels and magnitudes of a decoder with this end, from ONNX Runtime."""
    body = "\n".join(lines)
    text = f"""<ir_version: 10, opset_import: ["" : 24]>
    decoder (float[images, 4] given) => (uint8[images, 4] pixels)
    <float low = {{0}}, float high = {{255}}, int64[1] all = {{-1}}, int64[2] back = {{-1, 4}},
     uint8[4] table = {{1, 2, 3, 4}}>
    {{
        x = Identity(given)
        {body}
        pixels = Cast<to = 2>(y)
    }}"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    add_magnitude(model, MAGNITUDE)
    file = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {"given": given})


@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_the_magnitude_is_not_finite_where_any_value_is_not_before_it_is_cut(end: str, value: float):
    sound = np.linspace(-0.5, 200, 12, dtype=np.float32).reshape(3, 4)
    _, magnitude = run(ENDS[end], sound)
    assert magnitude.shape == (3,)
    check_magnitude("decoder", magnitude)
    damaged = sound.copy()
    damaged[1, 2] = value
    _, magnitude = run(ENDS[end], damaged)
    overflows = not np.isfinite(value) or end == "widened from half precision"
    # Where the first axis is not that of images, all of them are refused.
    others = not overflows or end != "without the first axis"
    assert np.isfinite(magnitude).tolist() == [others, not overflows, others]


def test_a_magnitude_that_is_not_finite_is_refused_with_how_many_images_it_is_of():
    with pytest.raises(NotFiniteError, match="in 2 of 3 images"):
        check_magnitude("decode_image", np.array([np.nan, 1, np.inf], np.float32))


def test_pixels_that_are_looked_up_are_finite():
    lookup = ["i = Cast<to = 7>(x)", "y = Gather(table, i)"]
    pixels, magnitude = run(lookup, np.ones((2, 4), np.float32))
    assert (pixels == 2).all()
    assert np.isfinite(magnitude).all()
