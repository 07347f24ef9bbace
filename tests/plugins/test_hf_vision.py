"""Every family of vision transformers against transformers' own class, its folders, and its processor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

from janus_export.checks import check_onnx_parity
from janus_modular import CheckpointError, ConfigError, PixelSpec
from janus_plugins.understanding_encoders.hf_vision import (
    HfVisionConfig,
    HfVisionEncoder,
    resized_positions,
)

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20,
    "patch_size": 8,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {  # by model_type: options, class and register tokens
    "siglip_vision_model": ({"image_size": 32}, 0),
    "clip_vision_model": ({"image_size": 32}, 1),
    "dinov2": ({"image_size": 32}, 1),
    "dinov2_with_registers": ({"image_size": 32, "num_register_tokens": 4}, 5),
    "dinov3_vit": ({"image_size": 32, "num_register_tokens": 3}, 4),
    "vit": ({"image_size": 32}, 1),
    "deit": ({"image_size": 32}, 2),
    "siglip2_vision_model": ({"num_patches": 16}, 0),
    "aimv2_vision_model": ({"image_size": 32}, 0),
    "ijepa": ({"image_size": 32}, 0),
}


def encoder_of(family: str, **options: Any) -> HfVisionEncoder:
    torch.manual_seed(0)
    keys = {"model_type": family, **SIZES, **FAMILIES[family][0]}
    encoder = HfVisionEncoder(HfVisionConfig(config=keys, **options)).eval()
    for weight in encoder.parameters():
        nn.init.normal_(weight, std=0.3)
    return encoder


def inputs(model: Any, pixels: torch.Tensor) -> dict[str, Any]:
    """Name the inputs as transformers' documentation does; NaFlex patches come from its own processor."""
    family = model.config.model_type
    if family == "siglip2_vision_model":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        patches = torch.stack([torch.from_numpy(convert_image_to_patches(one.numpy(), 8)) for one in pixels])
        grid = [pixels.shape[2] // 8, pixels.shape[3] // 8]
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
            "spatial_shapes": torch.tensor([grid] * len(pixels)),
        }
    always = family.startswith(("dino", "aimv2"))
    return {"pixel_values": pixels} if always else {"pixel_values": pixels, "interpolate_pos_encoding": True}


def show_positions(aimv2: Any, height: int, width: int) -> None:
    """Give AIMv2, which has no rule for images of another size, the positions that SigLIP would see."""
    keys = {"image_size": 32, **SIZES}
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**keys))
    table = aimv2.embeddings.position_embedding
    siglip.embeddings.position_embedding.weight = table.weight
    fitted = siglip.embeddings.interpolate_pos_encoding(torch.empty(1, 16, 16), height, width)[0]
    aimv2.embeddings.position_embedding = nn.Embedding.from_pretrained(fitted)
    aimv2.embeddings.position_ids = torch.arange(len(fitted))[None]


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(32, 32), (48, 16), (24, 40), (16, 64)])  # the last: of 16 patches too
def test_features_are_the_patch_tokens_of_the_model_itself(family: str, size: tuple[int, int]) -> None:
    encoder = encoder_of(family)
    theirs = AutoModel.from_config(encoder.model.config).eval()
    theirs.load_state_dict(encoder.model.state_dict(), strict=False)  # it may have a pooling layer besides
    if family == "aimv2_vision_model":
        show_positions(theirs, *size)
    pixels = torch.randn(2, 3, *size)

    features = encoder(pixels)

    wanted = theirs(**inputs(theirs, pixels)).last_hidden_state[:, FAMILIES[family][1] :]
    assert features.shape == (2, math.prod(encoder.grid(*size)), encoder.feature_dim)
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [-2, 1])
def test_any_layer_can_be_read(family: str, layer: int) -> None:
    encoder = encoder_of(family, layer=layer)
    pixels = torch.randn(1, 3, 32, 32)

    features = encoder(pixels)

    hidden = encoder.model(**inputs(encoder.model, pixels), output_hidden_states=True).hidden_states
    assert len(hidden) == 4  # the embeddings, then each of three blocks
    torch.testing.assert_close(features, hidden[layer][:, FAMILIES[family][1] :])


@pytest.mark.parametrize("family", FAMILIES)
def test_sides_that_patches_do_not_divide_lose_their_rest(family: str) -> None:
    encoder = encoder_of(family)
    assert encoder(torch.randn(1, 3, 37, 50)).shape == (1, 4 * 6, 16)
    assert encoder.grid(37, 50) == (4, 6)


def test_aimv2s_position_table_is_trained_at_another_image_size() -> None:
    encoder = encoder_of("aimv2_vision_model")
    encoder(torch.randn(1, 3, 48, 24)).square().sum().backward()
    gradient = encoder.model.embeddings.position_embedding.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(1).min() > 0  # bicubic: every row of the table is seen


@pytest.mark.parametrize("family", FAMILIES)
def test_its_config_alone_builds_it_again(family: str) -> None:
    encoder = encoder_of(family, layer=-2)
    again = HfVisionEncoder(encoder.config)
    again.load_state_dict(encoder.state_dict())
    assert json.loads(json.dumps(encoder.config.config)) == encoder.config.config  # plain enough for YAML
    assert again.pixels == encoder.pixels


@torch.inference_mode()
@pytest.mark.parametrize(
    ("tower", "family"),
    [
        ("Siglip", "siglip_vision_model"),
        ("CLIP", "clip_vision_model"),
        ("Siglip2", "siglip2_vision_model"),
        ("Aimv2", "aimv2_vision_model"),
    ],
)
def test_a_two_tower_folder_gives_its_vision_tower(tmp_path: Path, tower: str, family: str) -> None:
    text = {**SIZES, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    text["projection_size"] = 16
    config = getattr(transformers, f"{tower}Config")(
        text_config=text, vision_config={**SIZES, **FAMILIES[family][0]}
    )
    model = getattr(transformers, f"{tower}Model")(config).eval()
    model.save_pretrained(tmp_path)

    encoder = HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path))).eval()
    _, missing, unexpected = encoder.load_pretrained(tmp_path)

    assert missing == []
    assert not [name for name in unexpected if "layers" in name and "vision" in name]
    pixels = torch.randn(1, 3, 32, 32)
    wanted = model.vision_model(**inputs(model.vision_model, pixels)).last_hidden_state
    torch.testing.assert_close(encoder(pixels), wanted[:, FAMILIES[family][1] :])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("vit", "deit", "dinov2")])
@pytest.mark.slow
def test_images_that_are_not_square_export(family: str) -> None:
    check_onnx_parity(encoder_of(family), torch.randn(2, 3, 48, 24), slot="understanding_encoders")


@pytest.mark.parametrize(
    ("processor", "spec"),
    [
        (
            transformers.SiglipImageProcessor(size={"height": 40, "width": 24}),
            PixelSpec(40, 24, "stretch", mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
        (
            transformers.CLIPImageProcessor(crop_size=48),
            PixelSpec(
                48,
                48,
                "crop",
                mean=(0.48145466, 0.4578275, 0.40821073),
                std=(0.26862954, 0.26130258, 0.27577711),
            ),
        ),
    ],
)
def test_the_folder_says_how_images_are_prepared(tmp_path: Path, processor: Any, spec: PixelSpec) -> None:
    encoder_of("vit").model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    read = HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path))).pixels

    assert read == spec


@pytest.mark.parametrize(
    ("family", "processor"),
    [
        ("siglip_vision_model", "SiglipImageProcessor"),
        ("siglip2_vision_model", "Siglip2ImageProcessor"),
        ("clip_vision_model", "CLIPImageProcessor"),
        ("aimv2_vision_model", "CLIPImageProcessor"),
        ("ijepa", "ViTImageProcessor"),
        ("vit", "ViTImageProcessor"),
    ],
)
def test_families_have_the_pixels_of_their_own_processor(family: str, processor: str) -> None:
    theirs = getattr(transformers, processor)
    spec = encoder_of(family).pixels
    assert (spec.height, spec.width) == (32, 32)
    assert (spec.mean, spec.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert spec.resize == ("crop" if getattr(theirs, "do_center_crop", None) else "stretch")


@pytest.mark.parametrize(
    ("family", "resize"), [("dinov2", "crop"), ("dinov2_with_registers", "crop"), ("dinov3_vit", "stretch")]
)
def test_dino_is_normalised_by_imagenets_mean(family: str, resize: str) -> None:
    spec = encoder_of(
        family
    ).pixels  # as its conversion writes it: DINOv2 crops 224 from 256, DINOv3 stretches
    assert (spec.height, spec.resize) == (32, resize)
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_config_decides_about_pixels() -> None:
    assert encoder_of("dinov2", pixels=PixelSpec(height=64)).pixels.height == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "give config"),
        ({"hidden_size": 16}, "no model_type"),
        ({"model_type": "resnet"}, "'resnet' is no plain vision transformer.*: its depths and hidden_sizes"),
        ({"model_type": "dinov3_convnext"}, "'dinov3_convnext' is no plain .*: its depths and hidden_sizes"),
        ({"model_type": "swin"}, "'swin' is no plain vision transformer.*: its depths make stages"),
        ({"model_type": "llama"}, "'llama' is no plain vision transformer.*: it has no patch_size"),
        ({"model_type": "vit_msn", **SIZES, "image_size": 32}, "give pixels"),
        (
            {"model_type": "dinov2", "hiden_size": 3},
            "config.hiden_size: 'dinov2' .* Did you mean 'hidden_size'",
        ),
        (
            {"model_type": "clip", "vision_config": {"patch_sise": 3}},
            "config.vision_config.patch_sise: 'clip_vision_model' .* Did you mean 'patch_size'",
        ),
        ({"model_type": "dinov22"}, "no model_type 'dinov22'. Did you mean dinov2"),
    ],
)
def test_what_is_not_enough_is_an_error(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HfVisionEncoder(HfVisionConfig(config=config))


@pytest.mark.parametrize("name", ["model.safetensors", "notes.txt", "model.bin", "."])
def test_what_is_no_folder_with_a_config_is_refused_in_words(name: str, tmp_path: Path) -> None:
    if name != ".":
        (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(CheckpointError, match=r"hf-vision reads a folder|holds no config of a vision model"):
        HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path / name)))


def test_layers_that_are_not_there_and_weights_without_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layer 4 of a model of 3 blocks"):
        encoder_of("vit", layer=4)
    with pytest.raises(CheckpointError, match="folder"):
        encoder_of("vit").load_pretrained(tmp_path / "model.safetensors")


def test_a_model_whose_tokens_are_not_patches_is_an_error() -> None:
    keys = {"model_type": "yolos", **SIZES, "image_size": [32, 32], "num_detection_tokens": 5}
    encoder = HfVisionEncoder(HfVisionConfig(config=keys, pixels=PixelSpec(32, 32)))
    with pytest.raises(ValueError, match=r"gave \(22,\) tokens, not 1 .* and 16 patches"):
        encoder(torch.randn(1, 3, 32, 32))


def test_aimv2_of_native_resolution_has_positions_for_any_grid() -> None:
    native = {"model_type": "aimv2_vision_model", **SIZES, "image_size": 32, "is_native": True}
    encoder = HfVisionEncoder(HfVisionConfig(config=native)).eval()
    assert encoder(torch.randn(1, 3, 48, 24)).shape == (1, 6 * 3, 16)


@pytest.mark.parametrize("grid", [(1, 1), (2, 6), (4, 4), (7, 3), (1, 16), (16, 2)])
def test_positions_of_naflex_are_those_of_transformers(grid: tuple[int, int]) -> None:
    table, count = torch.randn(4, 4, 6), grid[0] * grid[1]
    expected = resized_positions(table, torch.tensor([grid]), count)  # transformers' own
    torch.testing.assert_close(resized_positions(table, grid, count), expected, rtol=0, atol=1e-6)


def test_positions_of_one_column_are_those_of_one_row_turned() -> None:
    """torch's antialiased resize of memory in rows gives something else for one column."""
    table = torch.randn(4, 4, 6)
    column = resized_positions(table, (9, 1), 9)
    torch.testing.assert_close(column, resized_positions(table.transpose(0, 1), (1, 9), 9), rtol=0, atol=1e-6)
