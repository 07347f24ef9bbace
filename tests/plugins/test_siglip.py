"""SigLIP against the published numbers and transformers' own class, from each format it reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SiglipConfig as TheirConfig
from transformers import SiglipModel, SiglipVisionConfig, SiglipVisionModel

from janus_modular import CheckpointError, ComponentSpec, ConfigError, DescriptionError, PixelSpec, Plugins
from janus_modular.model.build import ModelBuilder
from janus_modular.weights.loading import load_weights
from janus_plugins.adaptors.mlp import MlpAdaptor, MlpConfig
from janus_plugins.understanding_encoders.siglip import SiglipConfig, SiglipEncoder
from janus_plugins.understanding_encoders.timm_config import timm_pixels, timm_tower

TINY: dict[str, Any] = {
    "feature_dim": 16,
    "layers": 3,
    "heads": 2,
    "intermediate": 20,
    "patch_size": 4,
    "image_size": 16,
}
THEIRS: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20,
    "patch_size": 4, "image_size": 16, "hidden_act": "gelu",
}  # fmt: skip


def load(encoder: SiglipEncoder, weights: dict[str, Tensor]) -> None:
    encoder.load_state_dict(dict(encoder.read_pretrained(weights)))


@pytest.fixture
def reference() -> SiglipVisionModel:
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**THEIRS)).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write transformers' weights in the published format, by the table of its conversion."""
    named: dict[str, Tensor] = {
        "pos_embed": state["embeddings.position_embedding.weight"].unsqueeze(0),
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embedding.bias"],
        "norm.weight": state["post_layernorm.weight"],
        "norm.bias": state["post_layernorm.bias"],
        "attn_pool.latent": torch.zeros(1, 1, 16),
    }
    for i in range(3):
        layer = f"encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{layer}self_attn.{one}_proj.{kind}"] for one in "qkv"]
            named[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            named[f"blocks.{i}.attn.proj.{kind}"] = state[f"{layer}self_attn.out_proj.{kind}"]
            for ours, timm in {"layer_norm1": "norm1", "layer_norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}.items():  # fmt: skip  # noqa: E501
                named[f"blocks.{i}.{timm}.{kind}"] = state[f"{layer}{ours}.{kind}"]
    return named


@torch.inference_mode()
def test_reads_the_published_format_and_gives_the_published_features(
    reference_weights: Callable[[str], dict[str, Tensor]], expected: dict[str, np.ndarray], astronaut: Tensor
) -> None:
    encoder = SiglipEncoder(SiglipConfig(select_layer=-23)).eval()  # the first two of 24 blocks
    load(encoder, reference_weights("vision_model."))
    adaptor = MlpAdaptor(MlpConfig(), 1024, 256)
    weights = reference_weights("aligner.")
    adaptor.load_state_dict({name.removeprefix("aligner."): weight for name, weight in weights.items()})

    embeddings = adaptor(encoder(astronaut), (24, 24))[0]

    for found, wanted in (
        (embeddings[::16], expected["und_embeds_sub"]),
        (embeddings.mean(0), expected["und_embeds_mean"]),
    ):
        # fp32 sums in another order: 1e-4 of the scale
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        encoder = SiglipEncoder(SiglipConfig())
    assert sum(weight.numel() for weight in encoder.parameters()) == 303_688_704
    assert encoder.grid(384, 384) == (24, 24)


@torch.inference_mode()
@pytest.mark.parametrize("format_name", ["own", "siglip", "two towers", "janus", "timm", "published"])
def test_reads_each_format_and_equals_transformers(reference: SiglipVisionModel, format_name: str) -> None:
    state = reference.state_dict()
    encoder = SiglipEncoder(SiglipConfig(**TINY)).eval()
    offered = {
        "own": {f"model.{name}": weight for name, weight in state.items()},
        "siglip": state,
        "two towers": {
            "text_model.embeddings.position_embedding.weight": torch.zeros(9, 16),
            **{f"vision_model.{name}": weight for name, weight in state.items()},
        },
        "janus": {
            f"model.vision_model.{name.replace('.out_proj.', '.projection_layer.')}": weight
            for name, weight in state.items()
        },
        "timm": timm_names(state),
        "published": {
            f"vision_model.vision_tower.{name}": weight for name, weight in timm_names(state).items()
        },
    }[format_name]

    load(encoder, offered)

    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder(pixels), reference(pixels).last_hidden_state)


TIMM: dict[str, Any] = {
    "architecture": "vit_base_patch16_siglip_224",
    "model_args": {"num_heads": 2, "embed_dim": 16, "act_layer": "gelu"},
    "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
}


@torch.inference_mode()
def test_a_folder_of_timms_is_read_as_it_describes_itself(
    reference: SiglipVisionModel, tmp_path: Path, plugins: Plugins
) -> None:
    save_file(
        {n: w.contiguous() for n, w in timm_names(reference.state_dict()).items()}, tmp_path / "a.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    sizes = {key: TINY[key] for key in ("layers", "intermediate", "patch_size", "image_size")}
    config = SiglipConfig(pretrained=str(tmp_path), **sizes)
    encoder: Any = ModelBuilder(plugins)(ComponentSpec("understanding_encoders", "siglip", config)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder(pixels), reference(pixels).last_hidden_state)
    assert (encoder.pixels.mean, encoder.pixels.std) == ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    for wrong in ({"heads": 4}, {"activation": "gelu_pytorch_tanh"}, {"feature_dim": 32}):
        with pytest.raises(DescriptionError, match=f"{next(iter(wrong))}: found .*, expected"):
            SiglipEncoder(replace(config, **wrong))
    with pytest.raises(DescriptionError, match=r"pixels.mean: found \(0.5"):
        SiglipEncoder(replace(config, pixels=PixelSpec(height=16, width=16)))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"architecture": "vit_base_patch16_siglip_224"}, "heads: found 2, expected 12"),
        (
            {**TIMM, "model_args": {"act_layer": "quick_gelu"}},
            "act_layer .* is 'quick_gelu'; expected gelu",
        ),
        ({**TIMM, "model_args": {"norm_layer": "rmsnorm"}}, "norm_layer .* is 'rmsnorm'; expected layernorm"),
        ({"num_attention_heads": 4}, "has num_attention_heads, but no model_type: write it there"),
    ],
)
def test_a_folder_that_describes_another_tower_is_refused(
    record: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises((DescriptionError, CheckpointError), match=said):
        SiglipEncoder(SiglipConfig(**TINY, activation="gelu", pretrained=str(tmp_path)))


def test_a_whole_siglip_saved_by_transformers_is_read() -> None:
    model = SiglipModel(TheirConfig(vision_config=THEIRS, text_config={**THEIRS, "vocab_size": 10}))
    encoder = SiglipEncoder(SiglipConfig(**TINY))
    load(encoder, model.state_dict())


@torch.inference_mode()
@pytest.mark.parametrize("size", [(16, 16), (24, 12), (18, 21)])
def test_positions_are_interpolated_as_transformers_does(
    reference: SiglipVisionModel, size: tuple[int, int]
) -> None:
    encoder = SiglipEncoder(SiglipConfig(**TINY)).eval()
    load(encoder, reference.state_dict())
    pixels = torch.randn(1, 3, *size)

    features = encoder(pixels)

    assert features.shape == (1, math.prod(encoder.grid(*size)), 16)
    wanted = reference(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(features, wanted)


@torch.inference_mode()
def test_a_position_table_of_another_size_is_interpolated(reference: SiglipVisionModel) -> None:
    encoder = SiglipEncoder(SiglipConfig(**{**TINY, "image_size": 24})).eval()
    load(encoder, reference.state_dict())
    pixels = torch.randn(1, 3, 24, 24)

    wanted = reference(pixels, interpolate_pos_encoding=True).last_hidden_state

    torch.testing.assert_close(encoder(pixels), wanted, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize(("select", "kept"), [(-1, 3), (-2, 2), (1, 1), (2, 2), (0, 3), (9, 3)])
def test_select_layer_keeps_the_first_blocks_and_the_final_norm(
    reference: SiglipVisionModel, select: int, kept: int
) -> None:
    encoder = SiglipEncoder(SiglipConfig(**TINY, select_layer=select)).eval()
    load(encoder, reference.state_dict())  # the blocks that were cut are passed over
    pixels = torch.randn(1, 3, 16, 16)

    reference.encoder.layers = reference.encoder.layers[:kept]

    assert len(encoder.model.encoder.layers) == kept
    torch.testing.assert_close(encoder(pixels), reference(pixels).last_hidden_state)


def test_a_tower_of_more_blocks_is_refused(reference: SiglipVisionModel) -> None:
    encoder = SiglipEncoder(SiglipConfig(**{**TINY, "layers": 2}))
    outcome = load_weights(encoder, encoder.read_pretrained(reference.state_dict()))
    assert outcome.unexpected
    assert all(name.startswith("model.encoder.layers.2.") for name in outcome.unexpected)


def test_the_ids_in_old_files_are_passed_over(reference: SiglipVisionModel) -> None:
    load(
        SiglipEncoder(SiglipConfig(**TINY)),
        {**reference.state_dict(), "embeddings.position_ids": torch.arange(16)},
    )


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(ConfigError, match="select_layer -4 leaves no block; the least is -3"):
        SiglipEncoder(SiglipConfig(**TINY, select_layer=-4))
    with pytest.raises(ValueError, match="16 features do not divide by 3 heads"):
        SiglipEncoder(SiglipConfig(**{**TINY, "heads": 3}))
    with pytest.raises(CheckpointError, match="no vision tower"):
        load(SiglipEncoder(SiglipConfig(**TINY)), {"lm_head.weight": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_runs_in_half_precision_at_another_size(dtype: torch.dtype) -> None:
    encoder = SiglipEncoder(SiglipConfig(**TINY)).to(dtype)
    assert encoder(torch.randn(1, 3, 8, 12)).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([1], r"model_args of timm's config.json is \[1\]; expected a mapping"),
        ({"num_heads": 0}, "model_args.num_heads of timm's config.json is 0; expected a whole number from 1"),
        ({"num_heads": "4"}, "model_args.num_heads of timm's config.json is '4'"),
        ({"class_token": True}, "model_args.class_token of timm's config.json is True; expected False"),
        ({"init_values": 1e-5}, "model_args.init_values of timm's config.json is 1e-05; expected None"),
        ({"block_fn": "parallel"}, "has block_fn, which siglip does not read"),
    ],
)
def test_values_of_other_types_in_a_description_of_timms_are_named(arguments: object, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        timm_tower({"architecture": "vit_base_patch16_siglip_224", "model_args": arguments})


@pytest.mark.parametrize(
    ("settings", "resize"),
    [
        ({}, None),
        ({"interpolation": "bicubic", "crop_mode": "squash", "crop_pct": 1.0}, "stretch"),
        ({"crop_mode": "center", "crop_pct": 0.9}, "crop"),
        ({"crop_mode": "border"}, "letterbox"),
    ],
)
def test_images_are_resized_as_a_description_of_timms_has_it(
    settings: dict[str, Any], resize: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert timm_pixels({"pretrained_cfg": settings}).get("resize") == resize
    assert ("crop_pct" in caplog.text) == (settings.get("crop_pct") == 0.9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("interpolation", "nearest"), ("crop_mode", "tiles"), ("crop_pct", "all"), ("mean", "abc"),
        ("std", [0.5, 0.5, "x"]),
    ],
)  # fmt: skip
def test_images_that_timm_would_treat_in_an_unsupported_way_are_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"pretrained_cfg.{key} of timm's config.json is "):
        timm_pixels({"pretrained_cfg": {key: value}})


@pytest.mark.parametrize("settings", [[1], "x"])
def test_settings_of_images_of_timms_that_are_no_mapping_are_named(settings: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"pretrained_cfg of timm's config.json is .*; expected a mapping"
    ):
        timm_pixels({"pretrained_cfg": settings})


@pytest.mark.parametrize(
    "numbers",
    [{"mean": (123, 116, 103)}, {"std": (58, 57, 57)}, {"mean": (1e39, 0.5, 0.5)}, {"std": (0, 1, 1)}],
)
def test_means_of_pixels_up_to_255_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected three numbers .*, for pixels from 0 to 1"):
        PixelSpec(**numbers)


def test_another_way_to_resize_than_the_folders_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash"}
    (tmp_path / "config.json").write_text(json.dumps(TIMM | {"pretrained_cfg": settings}))
    (tmp_path / "a.safetensors").write_bytes(b"")  # not read
    sizes = {key: TINY[key] for key in ("layers", "intermediate", "patch_size", "image_size")}
    config = SiglipConfig(pretrained=str(tmp_path), **sizes)
    assert SiglipEncoder(config).pixels.resize == "stretch"
    assert not caplog.messages
    SiglipEncoder(replace(config, pixels=PixelSpec(height=16, width=16)))
    assert "pixels.resize is letterbox" in caplog.text
    assert "resized by stretch" in caplog.text
