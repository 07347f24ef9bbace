"""Folders that transformers wrote: a component has the options of their configs, or is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3Config,
    LlamaConfig,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from janus_modular import CheckpointError, ComponentSpec, ConfigError, DescriptionError, Plugins
from janus_modular.model.build import ModelBuilder
from janus_plugins.backbones.hf import HfBackbone, HfConfig
from janus_plugins.hf_folders import check_described
from janus_plugins.image_tokenizers.hf_vq import HfVqConfig, HfVqTokenizer
from janus_plugins.understanding_encoders import siglip
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig

TINY = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    "llama, 8 heads, scaled positions": {
        "model_type": "llama", "num_attention_heads": 8,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
    },
    "qwen2, other theta": {
        "model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2", "head_dim": 8, "sliding_window": 5, "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 3.0,
    },
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 5},
    "granite": {
        "model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0,
        "attention_multiplier": 0.3, "residual_multiplier": 0.5,
    },
    "llama4": {
        "model_type": "llama4_text", "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
    },
    "mistral with a window": {"model_type": "mistral", "sliding_window": 5},
}  # fmt: skip
SHIPPED = {  # what a config that was written for another model may say
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def loud(model: nn.Module) -> nn.Module:
    """Give weights a size at which every rule of a family shows in what comes out."""
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def saved_decoder(folder: Path, **keys: Any) -> Any:
    torch.manual_seed(0)
    model: Any = loud(AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY, **keys})))
    model.save_pretrained(folder)
    return model


def built(slot: str, name: str, config: Any, plugins: Plugins) -> Any:
    part = ComponentSpec(slot, name, config, f"model.{slot}")
    return ModelBuilder(plugins)(part)


def greedy(backbone: Any, ids: Tensor, steps: int) -> list[int]:
    for _ in range(steps):
        hidden = backbone(backbone.embed(ids), positions=torch.arange(ids.shape[1])[None])
        ids = torch.cat([ids, backbone.logits(hidden[:, -1]).argmax(-1, keepdim=True)], 1)
    return ids[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_says_what_its_folders_own_model_says(
    family: str, tmp_path: Path, plugins: Plugins
) -> None:
    theirs = saved_decoder(tmp_path, **DECODERS[family])
    backbone = built("backbones", "hf", HfConfig(pretrained=str(tmp_path)), plugins).eval()
    ids = torch.randint(67, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert greedy(backbone, ids, 20) == expected[0].tolist()

    same = {
        key: DECODERS[family][key] for key in ("model_type", "rope_parameters") if key in DECODERS[family]
    }
    again = built("backbones", "hf", HfConfig(pretrained=str(tmp_path), config=same), plugins)
    assert again.config.config == backbone.config.config  # what is not written is the folder's
    with pytest.raises(ConfigError, match=r"backbones.config=null takes all values from there") as error:
        built("backbones", "hf", HfConfig(pretrained=str(tmp_path), config=dict(SHIPPED)), plugins)
    assert "found" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "written", "listed"),
    [
        ({}, {"rope_parameters": {"rope_theta": 500.0}}, {"config.rope_parameters.rope_theta"}),
        ({}, {"rope_theta": 500.0}, {"config.rope_theta"}),
        ({}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"config.rope_scaling"}),
        (
            {}, {"num_attention_heads": 8, "hidden_act": "gelu"},
            {"config.num_attention_heads", "config.hidden_act"},
        ),
        ({}, {"model_type": "qwen3", "rms_norm_eps": 1e-3}, {"config.model_type", "config.rms_norm_eps"}),
        ({"model_type": "mistral", "sliding_window": 5}, {"sliding_window": 9}, {"config.sliding_window"}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"config.tie_word_embeddings"}),
        ({}, {"rope_theta": 10000.0, "num_key_value_heads": 2, "head_dim": None, "dtype": "float16"}, set()),
        ({"model_type": "gemma3_text", "head_dim": 8}, {"hidden_size": 32}, set()),
    ],
)  # fmt: skip
def test_every_key_that_differs_is_listed_with_both_values(
    keys: dict[str, Any], written: dict[str, Any], listed: set[str], tmp_path: Path
) -> None:
    saved_decoder(tmp_path, **{"model_type": "llama", **keys})
    config = HfConfig(pretrained=str(tmp_path), config=written)
    if not listed:
        HfBackbone(config)
        return
    with pytest.raises(DescriptionError) as error:
        HfBackbone(config)
    assert {one.key for one in error.value.differences} == listed
    assert all(one.written != one.described for one in error.value.differences)


@pytest.mark.parametrize(
    ("written", "listed"),
    [
        (
            {"text_config": {"num_hidden_layers": 1}},
            "text_config.num_hidden_layers: found 1, expected 2",
        ),
        ({"text_config": {"rope_theta": 5.0}}, "config.text_config.rope_theta: found 5.0"),
        ({"vision_config": {"hidden_size": 8}}, "config.vision_config.hidden_size: found 8, expected 24"),
        (
            {"model_type": "gemma3", "num_attention_heads": 8},
            "config.num_attention_heads: found 8, expected 4",
        ),
        ({"model_type": "gemma3_text", "num_attention_heads": 8}, "num_attention_heads: found 8, expected 4"),
        ({"num_attention_heads": 8}, "config.num_attention_heads: found 8, expected 4"),
        ({"text_config": {"num_hidden_layers": 2}, "num_attention_heads": 4}, None),
    ],
)
def test_keys_are_compared_with_a_larger_model_and_with_its_decoder(
    written: dict[str, Any], listed: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = {**TINY, "head_dim": 8, "sliding_window": 5}
    Gemma3Config(text_config=text, vision_config=BASE).save_pretrained(tmp_path)
    config = HfConfig(pretrained=str(tmp_path), config=written)
    if listed is None:
        HfBackbone(config)
    else:
        with pytest.raises(DescriptionError, match=listed):
            HfBackbone(config)
    assert "change nothing" not in caplog.text


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 3e-6])
def test_numbers_are_compared_as_gguf_files_hold_them(eps: float, tmp_path: Path) -> None:
    """In float32, which is what is computed with."""
    described = LlamaConfig(**TINY, rms_norm_eps=torch.tensor(eps).item())
    assert described.rms_norm_eps != eps
    check_described({"rms_norm_eps": eps}, [described], tmp_path)
    with pytest.raises(DescriptionError):
        check_described({"rms_norm_eps": eps * 1.001}, [described], tmp_path)


def test_overrides_change_what_the_folder_says_on_purpose(tmp_path: Path) -> None:
    saved_decoder(tmp_path, model_type="llama")
    overrides = {"attention_dropout": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    backbone = HfBackbone(HfConfig(pretrained=str(tmp_path), config_overrides=overrides))
    assert backbone.model.config.rope_parameters["rope_theta"] == 5e5
    assert backbone.config.config_overrides == {}  # they are in config by now
    assert backbone.config.config is not None
    assert backbone.config.config["attention_dropout"] == 0.1
    with pytest.raises(ConfigError, match="'llama' has no keys dropuot"):
        HfBackbone(HfConfig(pretrained=str(tmp_path), config_overrides={"dropuot": 1}))
    with pytest.raises(ConfigError, match="here, write config"):
        HfBackbone(HfConfig(config={"model_type": "llama"}, config_overrides={"attention_dropout": 0.1}))


@pytest.mark.parametrize(
    "name",
    ["model.layers.5.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "lm_head.bias"],
)
def test_a_decoders_weights_are_all_used(name: str, tmp_path: Path, plugins: Plugins) -> None:
    saved_decoder(tmp_path, model_type="llama")
    file = tmp_path / "model.safetensors"
    others = {"v_head.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**load_file(file), **others}, file, {"format": "pt"})
    builder = ModelBuilder(plugins)
    builder(ComponentSpec("backbones", "hf", HfConfig(pretrained=str(tmp_path))))
    assert builder.reports[0].unexpected_keys == ["v_head.weight"]
    save_file({**load_file(file), name: torch.zeros(2)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 of its weights have no place in .*:\n +{name}"):
        built("backbones", "hf", HfConfig(pretrained=str(tmp_path)), plugins)


def test_tables_that_differ_are_not_tied_whatever_the_config_says(tmp_path: Path, plugins: Plugins) -> None:
    saved_decoder(tmp_path, model_type="llama", tie_word_embeddings=False)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    backbone = built("backbones", "hf", HfConfig(pretrained=str(tmp_path)), plugins)
    assert backbone.config.config["tie_word_embeddings"] is False
    rebuilt = HfBackbone(backbone.config)
    rebuilt.load_state_dict(backbone.state_dict())
    assert rebuilt.model.lm_head.weight is not rebuilt.model.model.embed_tokens.weight


BASE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1


def saved_siglip(folder: Path, **keys: Any) -> SiglipVisionModel:
    torch.manual_seed(0)
    model = SiglipVisionModel(SiglipVisionConfig(**{**BASE, **keys}))
    loud(model).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    SiglipImageProcessorPil(size=size).save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"num_attention_heads": 6, "layer_norm_eps": 1e-2},
    ],
)
def test_siglip_is_built_as_its_folder_says(keys: dict[str, Any], tmp_path: Path, plugins: Plugins) -> None:
    theirs = saved_siglip(tmp_path, **keys)
    ours = built(
        "understanding_encoders", "siglip", siglip.SiglipConfig(pretrained=str(tmp_path)), plugins
    ).eval()
    expected = theirs(PIXELS).last_hidden_state
    torch.testing.assert_close(ours(PIXELS), expected, rtol=0, atol=1e-5)  # the same sums, in float32
    assert (ours.pixels.height, ours.pixels.resize, ours.config.pretrained) == (16, "stretch", None)
    again = siglip.SiglipEncoder(ours.config)  # from its own words, no folder
    again.load_state_dict(ours.state_dict())
    torch.testing.assert_close(again.eval()(PIXELS), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_siglip_is_read_out_of_a_folder_of_two_towers(tmp_path: Path, plugins: Plugins) -> None:
    """SigLIP 2 of fixed size is saved so too."""
    text = {"vocab_size": 9, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**BASE, "hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 2}
    torch.manual_seed(0)
    theirs: Any = loud(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    theirs.save_pretrained(tmp_path)
    ours = built(
        "understanding_encoders", "siglip", siglip.SiglipConfig(pretrained=str(tmp_path)), plugins
    ).eval()
    expected = theirs.vision_model(PIXELS).last_hidden_state
    torch.testing.assert_close(ours(PIXELS), expected, rtol=0, atol=1e-5)


def test_a_siglip_that_is_written_otherwise_is_refused(tmp_path: Path) -> None:
    saved_siglip(tmp_path)
    shipped = {
        "feature_dim": 24,
        "layers": 3,
        "heads": 4,
        "intermediate": 40,
        "patch_size": 4,
        "image_size": 32,
    }
    with pytest.raises(DescriptionError) as error:
        siglip.SiglipEncoder(siglip.SiglipConfig(pretrained=str(tmp_path), activation="gelu", **shipped))
    found = {one.key: (one.written, one.described) for one in error.value.differences}
    assert found == {"heads": (4, 3), "activation": ("gelu", "gelu_pytorch_tanh")}
    spec = siglip.PixelSpec(height=16, width=16, mean=(0.4, 0.4, 0.4))
    with pytest.raises(DescriptionError, match=r"pixels.mean: found \(0.4, .*expected \(0.5"):
        siglip.SiglipEncoder(siglip.SiglipConfig(pretrained=str(tmp_path), pixels=spec))


def test_weights_that_do_not_describe_themselves_need_what_shapes_do_not_show(tmp_path: Path) -> None:
    saved_siglip(tmp_path)
    (tmp_path / "config.json").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ConfigError, match=r"write heads=..., activation=..."):
            siglip.SiglipEncoder(siglip.SiglipConfig(pretrained=str(path)))
    (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_siglip_224"}')  # timm's
    with pytest.raises(ConfigError, match=r"write activation=..."):
        siglip.SiglipEncoder(siglip.SiglipConfig(pretrained=str(tmp_path), heads=12))


VISION: dict[str, dict[str, Any]] = {
    "clip_vision_model": {},
    "dinov2": {"mlp_ratio": 2},
    "siglip_vision_model": {},
}


@torch.no_grad()
@pytest.mark.parametrize("family", VISION)
def test_hf_vision_takes_all_layers_of_a_folder_or_none(
    family: str, tmp_path: Path, plugins: Plugins
) -> None:
    torch.manual_seed(0)
    keys = {**BASE, "num_hidden_layers": 4, "model_type": family, **VISION[family]}
    theirs: Any = loud(AutoModel.from_config(AutoConfig.for_model(**keys)))
    theirs.save_pretrained(tmp_path)
    slot, name = "understanding_encoders", "hf-vision"
    ours = built(slot, name, HfVisionConfig(pretrained=str(tmp_path)), plugins).eval()
    special = 0 if family == "siglip_vision_model" else 1
    expected = theirs(PIXELS).last_hidden_state[:, special:]
    torch.testing.assert_close(ours(PIXELS), expected, rtol=0, atol=1e-5)
    fewer = {"model_type": family, "num_hidden_layers": 2}
    with pytest.raises(ConfigError, match=r"config.num_hidden_layers: found 2; expected 4, as"):
        built(slot, name, HfVisionConfig(pretrained=str(tmp_path), config=fewer), plugins)
    with pytest.raises(CheckpointError, match=r"of its weights have no place in .*hf-vision"):
        built(slot, name, HfVisionConfig(pretrained=str(tmp_path), config_overrides=fewer), plugins)


def test_hf_vq_is_held_to_its_folder(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "model_type": "emu3_vqgan", "base_channels": 32, "channel_multiplier": [1, 2], "hidden_size": 64,
        "num_res_blocks": 1, "attn_resolutions": [1], "codebook_size": 64, "temporal_downsample_factor": 1,
    }  # fmt: skip
    HfVqTokenizer(HfVqConfig(config=keys)).model.save_pretrained(tmp_path)
    written = {"model_type": "emu3_vqgan", "temporal_downsample_factor": 4, "codebook_size": 64}
    with pytest.raises(DescriptionError, match="temporal_downsample_factor: found 4, expected 1"):
        HfVqTokenizer(HfVqConfig(pretrained=str(tmp_path), config=written))
    assert HfVqTokenizer(HfVqConfig(pretrained=str(tmp_path), config={"codebook_size": 64})).frames == 1
