"""Vision transformers from folders as the hub holds them: every name is read, missed or reported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from janus_modular import CheckpointError, ComponentSpec
from janus_modular.weights.pretrained import load_pretrained
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig, HfVisionEncoder

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20,
    "patch_size": 8,
}  # fmt: skip
CLIP_LAYER = [
    *(f"self_attn.{one}_proj.{end}" for one in "qkv" for end in ("weight", "bias")),
    "self_attn.out_proj.weight", "self_attn.out_proj.bias", "layer_norm1.weight", "layer_norm1.bias",
    "layer_norm2.weight", "layer_norm2.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
]  # fmt: skip
VIT_ATTENTION = [
    *(f"attention.attention.{one}.{end}" for one in ("query", "key", "value") for end in ("weight", "bias")),
    "attention.output.dense.weight", "attention.output.dense.bias",
]  # fmt: skip
DINO_LAYER = [
    "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "layer_scale1.lambda1", "layer_scale2.lambda1"
]  # fmt: skip
PUBLISHED: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    # on the hub, by family: where its layers are, what is in one, what is outside of them, what else there is
    "siglip2_vision_model": (
        "vision_model.encoder.layers",
        CLIP_LAYER,
        [
            "vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.patch_embedding.bias",
            "vision_model.embeddings.position_embedding.weight",
            "vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias",
        ],
        ["vision_model.head.probe", "logit_scale", "text_model.head.weight"],
    ),
    "clip_vision_model": (
        "vision_model.encoder.layers",
        CLIP_LAYER,
        [
            "vision_model.embeddings.class_embedding", "vision_model.embeddings.patch_embedding.weight",
            "vision_model.embeddings.position_embedding.weight",
            "vision_model.pre_layrnorm.weight", "vision_model.pre_layrnorm.bias",
            "vision_model.post_layernorm.weight", "vision_model.post_layernorm.bias",
        ],
        ["visual_projection.weight", "logit_scale", "text_model.final_layer_norm.weight"],
    ),
    "dinov2_with_registers": (
        "encoder.layer",
        [*DINO_LAYER, *VIT_ATTENTION, "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"],
        [
            "embeddings.cls_token", "embeddings.mask_token", "embeddings.register_tokens",
            "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight",
            "embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias",
        ],
        ["classifier.weight"],
    ),
    "dinov3_vit": (
        "layer",
        [
            *DINO_LAYER, "attention.q_proj.weight", "attention.q_proj.bias", "attention.k_proj.weight",
            "attention.v_proj.weight", "attention.v_proj.bias", "attention.o_proj.weight",
            "attention.o_proj.bias", "mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.weight",
            "mlp.down_proj.bias",
        ],
        [
            "embeddings.cls_token", "embeddings.mask_token", "embeddings.register_tokens",
            "embeddings.patch_embeddings.weight", "embeddings.patch_embeddings.bias",
            "norm.weight", "norm.bias",
        ],
        ["classifier.weight"],
    ),
    "aimv2_vision_model": (
        "encoder.layers",
        [
            *(f"attention.{one}_proj.weight" for one in ("q", "k", "v", "out")), "rms_norm1.weight",
            "rms_norm2.weight", *(f"ffn.{one}_proj.weight" for one in ("gate", "up", "down")),
        ],
        [
            "embeddings.patch_embed.weight", "embeddings.patch_embed.bias", "embeddings.rms_norm.weight",
            "embeddings.position_embedding.weight", "rms_norm.weight",
        ],
        ["head.cls_token"],
    ),
    "ijepa": (
        "encoder.layer",
        [
            *VIT_ATTENTION, "layernorm_before.weight", "layernorm_before.bias", "layernorm_after.weight",
            "layernorm_after.bias", "intermediate.dense.weight", "intermediate.dense.bias",
            "output.dense.weight", "output.dense.bias",
        ],
        [
            "embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight",
            "embeddings.patch_embeddings.projection.bias", "layernorm.weight", "layernorm.bias",
        ],
        ["pooler.dense.weight"],
    ),
}  # fmt: skip
OWN_NAMES = {  # of what transformers calls otherwise since; the order counts
    r"^vision_model\.": "",
    r"attention\.attention\.(q|k|v)\w+": r"attention.\1_proj",
    r"attention\.output\.dense": "attention.o_proj",
}


def own_name(family: str, name: str) -> str:
    for theirs, ours in OWN_NAMES.items():
        name = re.sub(theirs, ours, name)
    if family == "dinov3_vit":
        return re.sub(r"^layer\.", "model.layer.", name)
    if family == "ijepa":
        name = name.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        return name.replace("encoder.layer.", "layers.")
    return name


def random_encoder(family: str) -> HfVisionEncoder:
    torch.manual_seed(0)
    size = {"num_patches": 16} if family == "siglip2_vision_model" else {"image_size": 32}
    encoder = HfVisionEncoder(HfVisionConfig(config={"model_type": family, **SIZES, **size})).eval()
    for weight in encoder.parameters():
        nn.init.normal_(weight, std=0.3)
    return encoder


def published(family: str, folder: Path) -> HfVisionEncoder:
    """Write a folder as the hub holds one, and return the encoder whose weights are in it."""
    source = random_encoder(family)
    layers, inside, outside, besides = PUBLISHED[family]
    names = [*outside, *(f"{layers}.{n}.{name}" for n in range(3) for name in inside)]
    own = source.model.state_dict()
    tensors = {name: own.pop(own_name(family, name)).contiguous() for name in names}
    assert not own  # the published names are all that it has
    save_file({**tensors, **{name: torch.zeros(2) for name in besides}}, folder / "model.safetensors")
    source.model.config.save_pretrained(folder)
    return source


@torch.inference_mode()
@pytest.mark.parametrize("family", PUBLISHED)
def test_published_folders_are_read_and_what_else_they_hold_is_reported(tmp_path: Path, family: str) -> None:
    source = published(family, tmp_path)
    encoder = HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path))).eval()

    _, missing, unexpected = encoder.load_pretrained(tmp_path)

    pixels = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(pixels), source(pixels), rtol=0, atol=0)
    assert missing == []
    assert sorted(unexpected) == sorted(own_name(family, name) for name in PUBLISHED[family][3])
    assert encoder.config.pretrained is None


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_a_published_folder_lacks_is_missing_by_name(tmp_path: Path, family: str) -> None:
    published(family, tmp_path)
    file = tmp_path / "model.safetensors"
    lost = f"{PUBLISHED[family][0]}.1.{PUBLISHED[family][1][0]}"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != lost}, file)
    part = ComponentSpec("understanding_encoders", "hf-vision", HfVisionConfig(pretrained=str(tmp_path)))

    with pytest.raises(CheckpointError) as error:
        load_pretrained(HfVisionEncoder(part.config), part)

    assert f"1 missing:\n    {own_name(family, lost)}" in str(error.value)
