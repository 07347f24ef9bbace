"""`joined`: the input and features of each encoder, alone and joined, and training one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_modular import ConfigError, PixelSpec, Plugins
from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.checkpoints.assembly import build_processor
from janus_modular.cli.info import gather
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.interfaces import ComponentSpec
from janus_modular.model.build import ModelBuilder, build_model
from janus_modular.model.model import JanusModel, Understanding
from janus_modular.testing.fixtures import context
from janus_modular.training.trainable import parameter_counts, set_trainable
from janus_plugins.adaptors.identity import IdentityAdaptor, IdentityConfig
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig, HfVisionEncoder
from janus_plugins.understanding_encoders.joined import Joined, JoinedConfig, size_for

SIGLIP: dict[str, Any] = {
    "name": "siglip", "feature_dim": 16, "layers": 1, "heads": 2, "intermediate": 20, "patch_size": 8,
    "image_size": 32, "pixels": {"height": 32, "width": 32, "resize": "crop"},
}  # fmt: skip
HF = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


def dino(patch: int, side: int) -> dict[str, Any]:
    config = {"model_type": "dinov2", "patch_size": patch, "image_size": side, **HF}
    return {"name": "hf-vision", "config": config}


def joined(plugins: Plugins, *encoders: dict[str, Any], **options: Any) -> Joined:
    torch.manual_seed(0)
    raw = {"encoders": list(encoders), **options}
    config = resolve(raw, JoinedConfig, plugins)
    return ModelBuilder(plugins)(ComponentSpec("understanding_encoders", "joined", config)).eval()


def alone(encoder: Any, pixels: Tensor) -> Tensor:
    """Run an encoder as the core does where it is the only one."""
    width = encoder.feature_dim
    return Understanding(encoder, IdentityAdaptor(IdentityConfig(), width, width))(pixels)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(32, 32), (48, 16)])
def test_features_are_those_of_each_with_its_own_normalisation(
    plugins: Plugins, size: tuple[int, int]
) -> None:
    both = joined(plugins, SIGLIP, dino(8, 32))
    pixels = torch.randint(256, (2, 3, *size), dtype=torch.uint8)

    features = alone(both, pixels)

    assert both.pixels == PixelSpec(32, 32, "crop", normalize=False)
    assert both.encoders[0].pixels.mean != both.encoders[1].pixels.mean
    assert (both.feature_dim, both.grid(*size)) == (40, (size[0] // 8, size[1] // 8))
    torch.testing.assert_close(features, torch.cat([alone(one, pixels) for one in both.encoders], dim=-1))


@torch.inference_mode()
def test_each_sees_the_image_in_its_own_size(plugins: Plugins) -> None:
    both = joined(plugins, dino(7, 28), SIGLIP)  # 4 x 4 patches each
    seen: list[Tensor] = []
    both.encoders[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)

    features = both(ramp)

    assert (both.pixels.height, both.pixels.width, tuple(features.shape)) == (32, 32, (1, 16, 40))
    spec = both.encoders[0].pixels
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    # bilinear: a ramp, read where the centres of the smaller image's pixels lie
    wanted = ((torch.arange(28) + 0.5) * 32 / 28 - 0.5) / 31
    torch.testing.assert_close(seen[0] * std + mean, wanted.expand(1, 3, 28, 28), atol=1e-5, rtol=0)


def test_images_of_another_size_are_shared_out_in_proportion(plugins: Plugins) -> None:
    both = joined(plugins, SIGLIP, dino(4, 16))
    assert both.grid(64, 32) == (8, 4)
    assert both(torch.rand(1, 3, 64, 32)).shape == (1, 32, 40)
    with pytest.raises(ValueError, match=r"4x3 features of 32x31 pixels, and .* 4x4 of 16x16"):
        both(torch.rand(1, 3, 32, 31))  # half of 31 pixels is 16, and so has a patch more


@pytest.mark.parametrize(
    ("encoders", "options", "message"),
    [
        ([SIGLIP], {}, "found 1 encoders; expected two or more"),
        (
            [SIGLIP, dino(16, 32)],
            {},
            r"encoders\[0\] \(siglip\) has 4x4 features of 32x32 pixels, and encoders\[1\] \(hf-vision\) 2x2"
            r" of 32x32; .* encoders\[1\] \(hf-vision\) has 4x4 of 64x64 pixels, or encoders\[0\] \(siglip\)"
            " has 2x2 of 16x16 pixels",
        ),
        (
            [SIGLIP, {**SIGLIP, "pixels": {"height": 32, "width": 32, "resize": "stretch"}}],
            {},
            r"differently \(encoders\[0\] \(siglip\): crop, encoders\[1\] \(siglip\): stretch\)",
        ),
    ],
)
def test_what_does_not_go_together_is_an_error(
    plugins: Plugins, encoders: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        joined(plugins, *encoders, **options)


def test_an_option_sets_the_resizing_of_all_encoders(plugins: Plugins) -> None:
    other = {**SIGLIP, "pixels": {"height": 32, "width": 32, "resize": "stretch", "fill": [1, 2, 3]}}
    both = joined(plugins, other, SIGLIP, resize="letterbox")
    assert (both.pixels.resize, both.pixels.fill) == ("letterbox", (1, 2, 3))


def test_the_shipped_pair_has_one_grid_and_the_published_sizes() -> None:
    model = build_model(resolve(load("janus_pro_1b_dinov2"), ModelConfig), on_meta=True)
    encoder: Any = model.understanding.encoder
    assert (encoder.feature_dim, encoder.grid(384, 384), model.understanding.num_tokens) == (
        2048,
        (24, 24),
        576,
    )
    assert size_for(encoder.encoders[1], (24, 24)) == (336, 336)
    counts = {row["path"]: row["parameters"] / 1e6 for row in gather("janus_pro_1b_dinov2", [])["components"]}
    inside = "understanding.encoder.encoders"
    # SigLIP-L as in Janus-Pro; DINOv2-L: 304.4 M, of which its four registers are 4,096
    assert (counts[f"{inside}[0]"], counts[f"{inside}[1]"]) == pytest.approx((303.689, 304.373), abs=1e-3)
    assert counts["understanding.encoder"] == 0


def config_of(*encoders: dict[str, Any]) -> ModelConfig:
    raw = load("tiny")
    raw["understanding"]["encoder"] = {"name": "joined", "encoders": list(encoders)}
    return resolve(raw, ModelConfig)


def test_stages_name_one_of_them() -> None:
    model = build_model(config_of(SIGLIP, dino(8, 32)))
    set_trainable(model, ["understanding.encoder.encoders.0", "understanding.adaptor"])
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    model.understanding(images).square().sum().backward()

    first, second = model.understanding.encoder.encoders
    assert all(weight.grad is not None for weight in first.parameters())
    assert all(weight.grad is None for weight in second.parameters())
    assert (first.training, second.training) == (True, False)
    sizes = {one.path: (one.trainable, one.frozen) for one in parameter_counts(model)}
    assert sizes["understanding.encoder"] == tuple(
        sum(weight.numel() for weight in one.parameters()) for one in (first, second)
    )


def test_each_has_its_own_pretrained_and_a_checkpoint_needs_neither(tmp_path: Path) -> None:
    torch.manual_seed(1)
    folders = []
    for name, side in (("first", 32), ("second", 28)):
        source = HfVisionEncoder(HfVisionConfig(config=dino(side // 4, side)["config"]))
        source.model.save_pretrained(tmp_path / name)
        folders.append({"name": "hf-vision", "pretrained": str(tmp_path / name)})
    assembly = ModelAssembly.from_config(config_of(*folders))
    model = assembly.model.eval()

    assert [report.source for report in assembly.provenance.pretrained] == [
        str(tmp_path / one) for one in ("first", "second")
    ]
    saved = read_again(model, tmp_path / "checkpoint")
    parts = saved.config.understanding.encoder.config.encoders
    assert [part.config.pretrained for part in parts] == [None, None]
    assert [part.config.config["patch_size"] for part in parts] == [8, 7]
    pixels = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(saved.understanding(pixels), model.understanding(pixels), rtol=0, atol=0)


def read_again(model: JanusModel, folder: Path) -> JanusModel:
    save(ModelAssembly(model, build_processor(model, "bytes")), folder)
    return ModelAssembly.from_checkpoint(folder).model


def test_it_can_be_checked_by_its_name(plugins: Plugins) -> None:
    component, pixels = context(plugins, "understanding_encoders", "joined")()
    assert len(component.encoders) == 2
    assert component(pixels).shape[-1] == component.feature_dim
