"""Folders of quantised weights are refused by the name of their method, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from janus_modular import CheckpointError, ComponentSpec, ConfigError, JanusError, Plugins
from janus_modular.model.build import ModelBuilder
from janus_plugins.backbones.hf import HfBackbone, HfConfig
from janus_plugins.understanding_encoders import siglip
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig, HfVisionEncoder

TINY = {
    "vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
BASE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "bitsandbytes (4-bit)": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes (8-bit)": {"load_in_8bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "fp8": {"quant_method": "fp8"},
    "torchao": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
}


def converted(folder: Path, model: PreTrainedModel, kind: torch.dtype) -> None:
    """Save a model, and convert its matrices."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {n: w.mul(10).to(kind) if w.dim() > 1 else w for n, w in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.uint8, torch.complex64])
@pytest.mark.parametrize("name", ["hf", "hf-vision", "siglip"])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    name: str, kind: torch.dtype, tmp_path: Path, plugins: Plugins
) -> None:
    if name == "hf":
        converted(tmp_path, LlamaForCausalLM(LlamaConfig(**TINY)), kind)
    else:
        converted(tmp_path, SiglipVisionModel(SiglipVisionConfig(**BASE)), kind)
    slot = "backbones" if name == "hf" else "understanding_encoders"
    spec = ComponentSpec(slot, name, plugins.entry(slot, name).config(pretrained=str(tmp_path)))
    with pytest.raises(CheckpointError, match=rf"weight: found {kind}"):
        ModelBuilder(plugins)(spec)


def test_buffers_of_integers_are_no_weights(tmp_path: Path, plugins: Plugins) -> None:
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    buffers = {"model.layers.0.attention.bias": torch.ones(1, 1, dtype=torch.bool)}
    buffers |= {"model.position_ids": torch.arange(3), "bn.num_batches_tracked": torch.tensor(1)}
    save_file(
        {**load_file(file), **{"extra." + name: x for name, x in buffers.items()}}, file, {"format": "pt"}
    )
    ModelBuilder(plugins)(ComponentSpec("backbones", "hf", HfConfig(pretrained=str(tmp_path))))


def test_weights_that_mlx_quantised_are_refused(tmp_path: Path) -> None:
    keys = {**TINY, "model_type": "llama", "quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(CheckpointError, match=r"quantised by mlx \(quantization in config.json\)"):
        HfBackbone(HfConfig(pretrained=str(tmp_path)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["hf", "lora"])
def test_quantised_weights_are_refused_by_the_methods_name(
    method: str, wrapped: bool, tmp_path: Path, plugins: Plugins
) -> None:
    keys = {**TINY, "model_type": "llama", "quantization_config": METHODS[method]}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    backbone = ComponentSpec("backbones", "hf", HfConfig(pretrained=str(tmp_path)))
    if wrapped:
        backbone = ComponentSpec(
            "backbones", "lora", plugins.entry("backbones", "lora").config(backbone=backbone)
        )
    with pytest.raises(JanusError) as error, torch.device("meta"):
        ModelBuilder(plugins, on_meta=True)(backbone)  # before weights are read
    assert f"quantised by {method} (quantization_config in config.json)" in str(error.value)
    assert "dequantise it first" in str(error.value)


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_old_quantisers_are_known_by_their_files(file: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama"}))
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"quantised by {method} \({file}\)"):
        HfBackbone(HfConfig(pretrained=str(tmp_path)))


def test_a_quantised_tower_inside_a_larger_config_is_refused(tmp_path: Path) -> None:
    vision = {**BASE, "model_type": "siglip_vision_model", "quantization_config": METHODS["awq"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": vision}))
    said = r"quantised by awq \(vision_config.quantization_config"
    with pytest.raises(CheckpointError, match=said):
        HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path)))
    with pytest.raises(CheckpointError, match=said):
        siglip.SiglipEncoder(siglip.SiglipConfig(pretrained=str(tmp_path)))


def test_quantisation_that_is_written_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone.config.quantization_config: quantised layers"):
        HfBackbone(HfConfig(config={"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}))
