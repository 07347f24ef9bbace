"""A third-party tokenizer of latent tokens without a grid: checked, trained, drawn, exported, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import ImageTarget, Message, PromptError, Sample, Text
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.plugins import Plugins
from janus_modular.testing import ImageTokenizerContract

PLUGIN = Path(__file__).with_name("one_dimensional_tokenizer.py")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


@pytest.fixture
def assembly(plugins: Plugins) -> ModelAssembly:
    plugins.add_file(PLUGIN)
    raw = load("model/tiny", ["generation.tokenizer={name: latent-tokens}"], plugins)
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, plugins=plugins), plugins)
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return assembly


class TestItsContract(ImageTokenizerContract):
    @pytest.fixture(autouse=True)
    def _of_plugins(self, plugins: Plugins) -> None:
        plugins.add_file(PLUGIN)
        self.entry = plugins.entry("image_tokenizers", "latent-tokens")

    def make(self) -> tuple[Any, torch.Tensor]:
        torch.manual_seed(0)
        return self.entry.factory(self.entry.config()), torch.rand(2, 3, 32, 32) * 2 - 1


def test_an_image_takes_its_few_tokens_and_they_are_learned(
    assembly: ModelAssembly, plugins: Plugins
) -> None:
    sample = Sample([Message("user", [Text("a cat")]), Message("assistant", [ImageTarget(NOISE)])])
    sequence = assembly.processor.sequence(sample)
    assert int(sequence.generation_mask.sum()) == 8
    model = assembly.model
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        loss = model(collate([sequence])).losses["image"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    [image] = Janus.of(assembly, plugins).draw("a cat", 1, guidance=2)
    assert image.size == (32, 32)


def test_it_draws_no_other_size_and_says_why(assembly: ModelAssembly, plugins: Plugins) -> None:
    with pytest.raises(PromptError, match="latent-tokens: 32x48; expected 32x32"):
        Janus.of(assembly, plugins).draw("a cat", 1, size=(32, 48))


@pytest.mark.slow
def test_its_bundle_draws_what_torch_draws(assembly: ModelAssembly, plugins: Plugins, tmp_path: Path) -> None:
    save(assembly, tmp_path / "model", plugins=plugins)
    bundle = export(tmp_path / "model", tmp_path / "bundle", ExportConfig(variants=["fp32"]))
    [report] = verify(bundle, tmp_path / "model")
    assert report.passed, report.failures
    expected, actual = (
        Janus.from_pretrained(folder, device="cpu").draw("a cat", 2, guidance=2, seed=3)
        for folder in (tmp_path / "model", bundle)
    )
    assert np.array_equal(np.stack(expected.encoded), np.stack(actual.encoded))
