"""Bundles of models that read images in sizes of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from janus_export.bundle.bundle import load_bundle
from janus_export.config import ExportConfig
from janus_export.errors import ExportError
from janus_export.onnx_export.export import export
from janus_export.tensorrt_build.build import BuildConfig, build
from janus_export.verify import verify
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.processing.image_transforms import encoder_inputs

pytestmark = pytest.mark.slow

PIXELS = "pixels: {height: 32, width: 32, resize: native, multiple: 8}"
HF = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, patch_size: 8"
ENCODERS = {
    "vit": f"{{name: vit, feature_dim: 32, layers: 1, heads: 2, stem: [8, 16, 32], {PIXELS}}}",
    "siglip": "{name: siglip, feature_dim: 32, layers: 2, heads: 4, intermediate: 64, patch_size: 8,"
    f" image_size: 32, activation: gelu, {PIXELS}}}",
    "siglip2": "{name: hf-vision, config: {model_type: siglip2_vision_model, intermediate_size: 64,"
    f" num_patches: 16, {HF}}}, {PIXELS}}}",
    "dinov2": f"{{name: hf-vision, config: {{model_type: dinov2, image_size: 32, {HF}}}, {PIXELS}}}",
    "dinov3": "{name: hf-vision, config: {model_type: dinov3_vit, image_size: 32, intermediate_size: 64,"
    f" {HF}}}, {PIXELS}}}",
}
NOISE = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(NOISE[:h, :w]) for h, w in ((20, 60), (70, 25), (33, 33), (5, 80), (19, 58))]
ELONGATED = [Image.fromarray(NOISE[:h, :w]) for h, w in ((80, 4), (4, 80), (80, 6), (70, 10))]


def saved(folder: Path, *overrides: str) -> Path:
    """Save the tiny model with random weights, large enough for clear choices."""
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(load("model/tiny", overrides), ModelConfig))
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    save(assembly, folder)
    return folder


@pytest.mark.parametrize("name", ENCODERS)
def test_a_bundle_reads_images_in_their_own_sizes_as_torch_does(name: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "model", f"understanding.encoder={ENCODERS[name]}")
    variants = ["fp32", "cpu-int8"] if name == "vit" else ["fp32"]
    bundle = export(checkpoint, tmp_path / "bundle", ExportConfig(variants=variants))
    for report in verify(bundle, checkpoint):
        assert report.passed, report.failures
    shape = load_bundle(bundle).contract("understand", "fp32")["inputs"][0]["shape"]
    assert shape == ["images", 3, "8*image_rows", "8*image_columns"]
    expected, actual = (Janus.from_pretrained(folder, device="cpu") for folder in (checkpoint, bundle))
    for images in ([IMAGES[3]], IMAGES[:3], [IMAGES[0], IMAGES[1], IMAGES[4]]):
        answer = actual.chat("what?", images, max_tokens=8)
        assert answer == expected.chat("what?", images, max_tokens=8)
        assert answer.usage == expected.chat("what?", images, max_tokens=8).usage
    spec = expected.processor.pixels
    for image in [*IMAGES, *ELONGATED]:  # of one column and of one row, too
        [pixels] = encoder_inputs(image, spec)
        with torch.no_grad():
            read = expected.model.understanding(torch.from_numpy(pixels)[None]).numpy()
        found = actual.runtime.run("understand", pixels[None])
        # 1e-4 of the largest: float32 sums in another order
        assert np.abs(found - read).max() <= 1e-4 * np.abs(read).max(), pixels.shape


def test_a_bundle_reads_tiles_as_torch_does(tmp_path: Path) -> None:
    pixels = "understanding.encoder.pixels={height: 32, width: 32, resize: tiles, max_tiles: 4}"
    checkpoint = saved(tmp_path / "model", pixels)
    bundle = export(checkpoint, tmp_path / "bundle", ExportConfig(variants=["fp32"]))
    assert verify(bundle, checkpoint)[0].passed
    expected, actual = (Janus.from_pretrained(folder, device="cpu") for folder in (checkpoint, bundle))
    answer = actual.chat("what?", IMAGES[:3], max_tokens=8)
    assert answer == expected.chat("what?", IMAGES[:3], max_tokens=8)
    assert answer.usage.prompt_image_tokens == 16 * (4 + 4 + 1)  # 1 x 3 and 3 x 1 tiles, and the wholes


def test_a_resampler_makes_as_many_positions_of_every_size(tmp_path: Path) -> None:
    adaptor = (
        "understanding.adaptor={name: perceiver, queries: 5, layers: 1, heads: 2, kv_heads: 1, head_dim: 8}"
    )
    checkpoint = saved(tmp_path / "model", f"understanding.encoder={ENCODERS['vit']}", adaptor)
    bundle = export(checkpoint, tmp_path / "bundle", ExportConfig(variants=["fp32"]))
    assert verify(bundle, checkpoint)[0].passed
    expected, actual = (Janus.from_pretrained(folder, device="cpu") for folder in (checkpoint, bundle))
    assert actual.chat("what?", IMAGES[:3], max_tokens=8) == expected.chat("what?", IMAGES[:3], max_tokens=8)
    with pytest.raises(ExportError, match="understand: it reads images in native sizes"):
        build(bundle, BuildConfig("tensorrt-rtx", sm=["8.9"]))
