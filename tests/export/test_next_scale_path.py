"""A third-party path that draws many codes in a step: checked, trained, drawn, exported, verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import ImageTarget, Message, PluginError, Sample, Text
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.model.batch import collate
from janus_modular.plugins import Plugins
from janus_modular.serving import DrawRequest, Engine
from janus_modular.testing import checks_of, run_check

PLUGIN = Path(__file__).with_name("next_scale_path.py")


@pytest.fixture
def assembly(plugins: Plugins) -> ModelAssembly:
    plugins.add_file(PLUGIN)
    raw = {**load("model/tiny", plugins=plugins), "generation": {"name": "next-scale"}}
    torch.manual_seed(0)
    assembly = ModelAssembly.from_config(resolve(raw, ModelConfig, plugins=plugins), plugins)
    for weight in assembly.model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return assembly


@pytest.mark.parametrize("check", [check.name for check in checks_of("generation")])
def test_its_contract_holds(plugins: Plugins, check: str) -> None:
    plugins.add_file(PLUGIN)
    entry = plugins.entry("generation", "next-scale")
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    [found] = [each for each in checks_of("generation") if each.name == check]

    def make() -> tuple[torch.nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        return entry.factory(entry.config(), 16), pixels

    result = run_check(found, make, slot="generation")
    assert result.outcome in ("passed", "skipped"), result.note


def test_codes_of_all_scales_are_learned_and_drawn_in_three_passes(
    assembly: ModelAssembly, plugins: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = Image.new("RGB", (32, 32), (220, 30, 30))
    sample = Sample([Message("user", [Text("red")]), Message("assistant", [ImageTarget(red)])])
    sequence = assembly.processor.sequence(sample)
    assert int(sequence.generation_mask.sum()) == 1 + 4 + 16
    model = assembly.model
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(30):
        loss = model(collate([sequence])).losses["image"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    janus = Janus.of(assembly, plugins)
    calls = []
    forward = model.backbone.forward
    monkeypatch.setattr(
        model.backbone, "forward", lambda x, **options: calls.append(x.shape[1]) or forward(x, **options)
    )
    [image] = janus.draw("red", 1, temperature=0.1)
    assert calls[1:] == [1, 4, 16]  # the prompt, and a pass for each scale
    drawn = np.asarray(image, int).reshape(-1, 3).mean(0)
    expected = model.generation.decode_image(model.generation.targets(torch.from_numpy(pixels_of(red))))
    assert np.abs(drawn - expected.float().mean((0, 2, 3)).numpy()).max() < 12  # of 255


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))[None]


def test_an_engine_draws_it_beside_other_requests(assembly: ModelAssembly, plugins: Plugins) -> None:
    janus = Janus.of(assembly, plugins)
    expected = [janus.draw(prompt, 2, seed=4)[1] for prompt in ("a cat", "two dogs")]
    with Engine(janus, rows=6) as engine:
        jobs = [engine.submit(DrawRequest(prompt, 2, seed=4)) for prompt in ("a cat", "two dogs")]
        for job, image in zip(jobs, expected, strict=True):
            assert job.result(60)[1].tobytes() == image.tobytes()


@pytest.mark.slow
def test_its_bundle_draws_what_torch_draws(assembly: ModelAssembly, plugins: Plugins, tmp_path: Path) -> None:
    save(assembly, tmp_path / "model", plugins=plugins)
    bundle = export(tmp_path / "model", tmp_path / "bundle", ExportConfig(variants=["fp32"]))
    [report] = verify(bundle, tmp_path / "model")
    assert report.passed, report.failures
    expected, actual = (
        Janus.from_pretrained(folder, device="cpu").draw(["a cat", "two dogs"], 2, seed=3)
        for folder in (tmp_path / "model", bundle)
    )
    for drawn, reference in zip(actual, expected, strict=True):
        assert np.abs(np.asarray(drawn, int) - np.asarray(reference, int)).max() <= 1


def test_a_broken_plugin_file_of_the_process_disturbs_no_check(plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("VALUE = 1\n", "utf-8")
    with pytest.raises(PluginError, match="registers nothing"):
        plugins.add_file(tmp_path / "broken.py")
    test_its_contract_holds(plugins, "sharding")
