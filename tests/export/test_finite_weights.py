"""Weights that overflow in the dtype of a variant are errors when they are written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from janus_export.bundle.files import write_stream
from janus_export.errors import ExportError
from janus_export.onnx_export.quantization import QuantizationSpec
from janus_export.onnx_export.quantize import stored
from janus_export.onnx_export.weights import Source, is_finite
from janus_modular.cli.app import app

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAN, INF = float("nan"), float("inf")


class Two(nn.Module):
    """Two linear layers and a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(64, 300_000 // 64)
        self.register_buffer("ids", torch.arange(5))


def source(change: Callable[[dict[str, Tensor]], None], dtype: torch.dtype = SINGLE) -> Source:
    torch.manual_seed(0)
    model = Two()
    tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in model.state_dict().items()}
    change(tensors)
    return Source(model, tensors, "here")


def put(name: str, value: float, at: int = -1) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors[name].view(-1).__setitem__(at, value)


@pytest.mark.parametrize(
    ("value", "dtype", "names"),
    [
        (1e5, HALF, r"first\.weight \(up to 100000\)"),
        (-65520.0, HALF, r"first\.weight \(up to 65520\)"),
        (3.4e38, BRAIN, r"first\.weight \(up to 3.4e\+38\)"),
        (NAN, HALF, r"first\.weight \(1 NaN, 0 infinite, of 512\)"),
        (NAN, SINGLE, r"first\.weight \(1 NaN, 0 infinite, of 512\)"),
        (-INF, BRAIN, r"first\.weight \(0 NaN, 1 infinite, of 512\)"),
    ],
)
def test_a_weight_that_is_not_finite_in_the_target_dtype_is_named(
    tmp_path: Path, value: float, dtype: torch.dtype, names: str
) -> None:
    tensors = source(put("first.weight", value))
    with pytest.raises(ExportError, match=names):
        write_stream(tensors.stored(["first.bias", "first.weight"], dtype), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_all_such_weights_are_named_and_no_other(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        put("second.weight", INF, at=200_000)(tensors)
        put("first.bias", 7e4, at=0)(tensors)

    with pytest.raises(ExportError) as raised:
        write_stream(source(change).stored(["second.weight"], HALF), tmp_path)
    assert "first.bias (up to 70000), second.weight (0 NaN, 1 infinite" in str(raised.value)
    assert "first.weight" not in str(raised.value)


@pytest.mark.parametrize(("value", "scale"), [(NAN, np.float32), (INF, np.float16), (6e5, np.float16)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_weight_is_held_to_it_too(tmp_path: Path, value: float, scale: type, bits: int) -> None:
    if value == 6e5 and bits == 8:
        value = 1e7  # its scale is 1/128 of it
    tensors = source(put("first.weight", value))
    quantization = QuantizationSpec("cpu", bits, 32, "nbits")
    with pytest.raises(ExportError, match=r"first\.weight \("):
        write_stream(
            stored(
                ["first.weight.codes", "first.weight.scales"], tensors, {"first.weight": quantization}, scale
            ),
            tmp_path,
        )


def test_what_fits_is_written_extremes_included(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        put("first.weight", 65504.0)(tensors)
        put("first.bias", 1e-30)(tensors)

    write_stream(source(change).stored(["first.bias", "first.weight", "ids"], HALF), tmp_path)
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.arange(3))


@pytest.mark.slow
def test_export_refuses_such_a_checkpoint_and_leaves_no_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    [file] = checkpoint.glob("*.safetensors")
    weights = load_file(file)
    name = min(weights)
    weights[name].view(-1)[0] = 1e5
    save_file(weights, file, {"format": "pt"})
    done = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "bundle"), "variants=[fp16]"])
    assert done.exit_code == 2, done.output
    assert f"{name} (up to 100000)" in " ".join(done.output.split())
    assert not (tmp_path / "bundle").exists()
