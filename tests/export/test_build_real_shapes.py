"""Engines at the shapes of Janus-Pro-1B: SigLIP-L at 384 pixels, VQ-16, both heads, four of 24 layers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_modular.checkpoints import ModelAssembly
from janus_modular.checkpoints.native import stored_tensors, write_description
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.model import JanusModel
from janus_modular.weights.writing import write_weights

LAYERS = 4
LAYER_BYTES = 2 * (4 * 2048**2 + 3 * 2048 * 5632)
"""Of a layer's matrices in half precision."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied afterwards: pytest would keep its gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def chance(model: JanusModel) -> Iterator[tuple[str, Tensor]]:
    """Make float16 weights of chance, one at a time, no two the same: equal ones an engine holds once."""
    block = (0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))).half()
    for number, (name, tensor) in enumerate(stored_tensors(model).items()):
        assert tensor.is_floating_point()
        size = tensor.numel()
        yield name, block.roll(number).repeat(-(-size // len(block)))[:size].clone().view(tensor.shape)


@pytest.mark.slow
def test_every_graph_of_the_published_model_becomes_an_engine(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    config = load(
        "model/janus_pro_1b", [f"backbone.config.num_hidden_layers={LAYERS}", "processor.tokenizer=bytes"]
    )
    assembly = ModelAssembly.from_config(resolve(config, ModelConfig), device="meta")
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_description(assembly, checkpoint, name="chance")
    write_weights(checkpoint, chance(assembly.model), max_shard_size=1 << 28)
    bundle = export(checkpoint, folder / "bundle", ExportConfig(variants=["fp16"]))
    shutil.rmtree(checkpoint)
    command = ["-m", "janus_modular", "build", str(bundle), "--target", "tensorrt-rtx", "--sm", "8.9"]
    subprocess.run([sys.executable, *command], check=True)  # whose memory is its own
    opened = load_bundle(bundle)
    engines = opened.manifest["built"]["fp16.tensorrt-rtx.sm89"]["engines"]
    with capsys.disabled():
        for graph, one in engines.items():
            memory = f"{(one['peak_bytes'] or 0) / 1e6:,.0f} MB of memory"
            print(f"\n{graph}: {one['bytes'] / 1e6:,.1f} MB, {one['seconds']:.1f} s, {memory}", end="")
    assert list(engines) == list(opened.graphs)
    assert engines["backbone"]["bytes"] > LAYERS * LAYER_BYTES
    assert engines["sample_text"]["bytes"] > 2 * 2 * 102_400 * 2048  # scores and embeddings of all words
    assert dict(opened.graphs["understand"]["inputs"][0])["shape"] == ["images", 3, 384, 384]
    for graph, one in engines.items():
        # TensorRT's own, and the weights once: they are read from mapped files, and written as a stream.
        assert one["peak_bytes"] < 0.8e9 + 1.2 * one["bytes"], graph
