"""The autoencoder of latent diffusion against diffusers' class, on weights in several formats."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from janus_modular import CheckpointError, ComponentSpec, ConfigError
from janus_modular.model.build import ModelBuilder
from janus_modular.plugins import Plugins
from janus_modular.testing import ImageAutoencoderContract
from janus_plugins.image_autoencoders.autoencoder_kl import AutoencoderKl, AutoencoderKlConfig, native_name

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "autoencoder_kl"
SIZES = {"channels": 32, "channel_multipliers": [1, 2, 2], "residual_blocks": 1}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The weights that the fixture was computed with, in diffusers' names."""
    sys.path.insert(0, str(FIXTURES / "reference"))
    from deterministic_weights import tensor_for

    sys.path.pop(0)
    keys = json.loads((FOLDER / "keys.json").read_text())
    return {key: torch.from_numpy(tensor_for(key, tuple(shape))) for key, shape in keys.items()}


@pytest.fixture
def folder(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    shutil.copy(FOLDER / "config.json", tmp_path)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    return tmp_path


def build(plugins: Plugins, **options: object) -> AutoencoderKl:
    config = AutoencoderKlConfig(**{**SIZES, **options})  # type: ignore[arg-type]
    return ModelBuilder(plugins)(ComponentSpec("image_autoencoders", "autoencoder-kl", config))


@torch.no_grad()
def check_expected(autoencoder: AutoencoderKl) -> None:
    """Compare with diffusers' results, within the rounding of float32 sums in another order."""
    expected = np.load(FOLDER / "expected.npz")
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 48)).astype(np.float32))
    encoded = autoencoder.encode(pixels)
    np.testing.assert_allclose(encoded / 0.13025, expected["mean"], atol=1e-4 * abs(expected["mean"]).max())
    np.testing.assert_allclose(autoencoder.moments(pixels)[1], expected["log_variance"], atol=1e-4)
    decoded = autoencoder.decode(encoded, height=32, width=48)[:, :, ::4, ::4]
    scale = abs(expected["decoded_sub"]).max()
    np.testing.assert_allclose(decoded, expected["decoded_sub"], atol=1e-4 * scale)


def test_diffusers_results(folder: Path, plugins: Plugins) -> None:
    check_expected(build(plugins, pretrained=str(folder)))


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def older(name: str) -> str:
    for new, old in OLD_ATTENTION.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def latent_diffusion(name: str) -> str:
    """Return a diffusers name in the names of latent diffusion's single files."""
    native = native_name(name, 3)
    for i in range(3):
        native = native.replace(f"decoder.conv_blocks.{i}.", f"decoder.up.{2 - i}.")
        native = native.replace(f"encoder.conv_blocks.{i}.", f"encoder.down.{i}.")
    for i, block in enumerate(("block_1", "attn_1", "block_2")):
        native = native.replace(f".mid.{i}.", f".mid.{block}.")
    return "first_stage_model." + native.replace(".res.", ".block.")


@pytest.mark.parametrize("rename", [older, latent_diffusion])
def test_other_names_of_the_same_weights(
    weights: dict[str, Tensor], rename: Callable[[str], str], plugins: Plugins, tmp_path: Path
) -> None:
    renamed = {rename(name): weight for name, weight in weights.items()}
    assert renamed.keys() != weights.keys()
    renamed["loss.logvar"] = torch.zeros(())
    save_file(renamed, tmp_path / "model.safetensors")
    check_expected(build(plugins, pretrained=str(tmp_path / "model.safetensors")))


def test_a_missing_weight_is_an_error(weights: dict[str, Tensor], plugins: Plugins, tmp_path: Path) -> None:
    name = "decoder.mid_block.attentions.0.to_q.weight"
    save_file({key: weight for key, weight in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder\.mid\.1\.q\.weight"):
        build(plugins, pretrained=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling_factor": 0.18215}, r"scaling_factor: found 0\.18215; expected 0\.13025"),
        ({"residual_blocks": 2}, "residual_blocks: found 2; expected 1"),
        ({"channel_multipliers": [1, 2, 4]}, r"channel_multipliers: found \[1, 2, 4\]; expected \[1, 2, 2\]"),
        ({"quant_conv": False}, "quant_conv: found False; expected True"),
    ],
)
def test_options_that_the_weights_deny(
    folder: Path, plugins: Plugins, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(plugins, pretrained=str(folder), **options)


def test_another_class_is_refused(folder: Path, plugins: Plugins) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "_class_name": "AutoencoderTiny"}))
    with pytest.raises(CheckpointError, match="found the class AutoencoderTiny"):
        build(plugins, pretrained=str(folder))


@pytest.mark.parametrize("options", [{"scaling_factor": 0.0}, {"channels": 0}, {"channel_multipliers": []}])
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AutoencoderKlConfig(**options)  # type: ignore[arg-type]


def test_shift_and_scale_undo_each_other(plugins: Plugins) -> None:
    torch.manual_seed(0)
    plain = build(plugins, scaling_factor=1.0, quant_conv=False)
    shifted = build(plugins, scaling_factor=0.5, shift_factor=0.25, quant_conv=False)
    shifted.load_state_dict(plain.state_dict())
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        encoded = plain.encode(pixels)
        assert torch.equal(shifted.encode(pixels), (encoded - 0.25) * 0.5)
        expected = plain.decode(encoded, height=16, width=16)
        torch.testing.assert_close(shifted.decode(shifted.encode(pixels), height=16, width=16), expected)
    with pytest.raises(ValueError, match=r"found images of \(4, 2, 2\); expected \(4, 4, 4\)"):
        plain.decode(encoded[:, :, :2, :2], height=16, width=16)


class TestAutoencoderKl(ImageAutoencoderContract):
    def make(self) -> tuple[AutoencoderKl, Tensor]:
        torch.manual_seed(0)
        config = AutoencoderKlConfig(channels=8, channel_multipliers=[1, 2], residual_blocks=1)
        return AutoencoderKl(config), torch.rand(2, 3, 8, 8) * 2 - 1
