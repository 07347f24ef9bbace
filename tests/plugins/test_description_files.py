"""Descriptions beside single files, adapters beside weights, and descriptions that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Idefics2Config,
    JanusConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from janus_modular import CheckpointError, ComponentSpec, ConfigError, DescriptionError, PixelSpec, Plugins
from janus_modular.model.build import ModelBuilder
from janus_plugins.adaptors.perceiver import PerceiverAdaptor, PerceiverConfig
from janus_plugins.backbones.hf import HfBackbone, HfConfig
from janus_plugins.hf_pixels import processor_settings
from janus_plugins.image_tokenizers.hf_vq import HfVqConfig, HfVqTokenizer
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig, HfVisionEncoder
from janus_plugins.understanding_encoders.siglip import SiglipConfig, SiglipEncoder, chosen_tower, kept_layers

TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
DECODER = {
    "model_type": "llama", "vocab_size": 19, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def saved_tower(folder: Path, **keys: Any) -> Path:
    SiglipVisionModel(SiglipVisionConfig(**{**TOWER, **keys})).save_pretrained(folder)
    return folder / "model.safetensors"


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_file_of_siglip_is_held_to_the_config_beside_it(tmp_path: Path, plugins: Plugins) -> None:
    file = saved_tower(tmp_path)
    wrong = SiglipConfig(pretrained=str(file), heads=4, activation="gelu")
    with pytest.raises(DescriptionError, match=r"heads: found 4, expected 3; activation: found 'gelu', exp"):
        SiglipEncoder(wrong)
    encoder: Any = ModelBuilder(plugins)(
        ComponentSpec("understanding_encoders", "siglip", SiglipConfig(pretrained=str(file)))
    )
    assert (encoder.tower.heads, encoder.tower.activation) == (3, "gelu_pytorch_tanh")


@pytest.mark.parametrize(
    "other", [{"model_type": "llama"}, {"model_type": "nobody"}, {"architecture": "vit"}]
)
def test_a_config_of_another_model_beside_a_file_is_not_its_own(tmp_path: Path, other: Any) -> None:
    file = saved_tower(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(other))
    sizes: dict[str, Any] = {
        "feature_dim": 24,
        "layers": 1,
        "intermediate": 40,
        "patch_size": 4,
        "image_size": 16,
    }
    encoder = SiglipEncoder(SiglipConfig(pretrained=str(file), heads=3, activation="gelu", **sizes))
    assert encoder.tower.activation == "gelu"


def test_a_file_of_hf_vq_is_held_to_the_config_beside_it(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "model_type": "emu3_vqgan", "base_channels": 32, "channel_multiplier": [1, 2], "hidden_size": 64,
        "num_res_blocks": 1, "attn_resolutions": [1], "codebook_size": 64, "temporal_downsample_factor": 1,
    }  # fmt: skip
    HfVqTokenizer(HfVqConfig(config=keys)).model.save_pretrained(tmp_path)
    file = str(tmp_path / "model.safetensors")
    with pytest.raises(DescriptionError, match="temporal_downsample_factor: found 4, expected 1"):
        HfVqTokenizer(HfVqConfig(pretrained=file, config={**keys, "temporal_downsample_factor": 4}))
    assert HfVqTokenizer(HfVqConfig(pretrained=file)).frames == 1
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert HfVqTokenizer(HfVqConfig(pretrained=file, config=keys)).frames == 1


@pytest.mark.parametrize("path", ["", "model.safetensors"])
def test_a_perceiver_is_held_to_idefics2s_config(tmp_path: Path, path: str) -> None:
    """Heads of another width have weights of the same shapes."""
    Idefics2Config(
        perceiver_config={
            "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4, "num_key_value_heads": 2,
            "resampler_head_dim": 6,
        }
    ).save_pretrained(tmp_path)  # fmt: skip
    (tmp_path / "model.safetensors").touch()
    right: dict[str, Any] = {"queries": 3, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 6}
    where = str(tmp_path / path)
    PerceiverAdaptor(PerceiverConfig(pretrained=where, **right), 8, 8)
    wrong = {**right, "heads": 8, "kv_heads": 4, "head_dim": 3}
    with pytest.raises(DescriptionError, match=r"heads: found 8, expected 4; kv_heads: .*head_dim: found 3"):
        PerceiverAdaptor(PerceiverConfig(pretrained=where, **wrong), 8, 8)
    (tmp_path / "config.json").unlink()
    PerceiverAdaptor(PerceiverConfig(pretrained=where, **wrong), 8, 8)  # nothing says otherwise
    del wrong["heads"]
    with pytest.raises(ConfigError, match=r"no config.json of Idefics2, and shapes .* write heads=\.\.\."):
        PerceiverAdaptor(PerceiverConfig(pretrained=where, **wrong), 8, 8)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("perceiver_config", "rms_norm_eps", 0.5),
        ("perceiver_config", "hidden_act", "gelu"),
        ("text_config", "hidden_act", "gelu"),
    ],
)
def test_a_perceiver_that_computes_otherwise_is_refused(
    part: str, key: str, value: object, tmp_path: Path
) -> None:
    Idefics2Config(**{part: {key: value}}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"describes {part}.{key} {value!r}; expected"):
        PerceiverAdaptor(PerceiverConfig(pretrained=str(tmp_path)), 8, 8)
    Idefics2Config().save_pretrained(tmp_path)
    with torch.device("meta"):
        adaptor = PerceiverAdaptor(PerceiverConfig(pretrained=str(tmp_path)), 8, 8)
    assert adaptor.config.heads == Idefics2Config().perceiver_config.resampler_n_heads


@pytest.mark.parametrize("whole", [True, False], ids=["beside weights", "alone"])
def test_adapters_are_not_put_on_weights_unasked(tmp_path: Path, whole: bool) -> None:
    """Transformers would, and would even look for their base by the path that the adapter names."""
    if whole:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**DECODER)).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for config in (HfConfig(pretrained=str(tmp_path)), HfConfig(pretrained=str(tmp_path), config=DECODER)):
        with pytest.raises(CheckpointError, match=r"holds an adapter of peft's .*name: lora"):
            HfBackbone(config)
    with pytest.raises(CheckpointError, match="holds an adapter of peft's"):
        HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path)))


@pytest.mark.parametrize("keys", [{"num_hidden_layers": "2"}, {"layer_types": ["full_attention"] * 3}])
def test_a_damaged_description_is_named(tmp_path: Path, keys: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**DECODER, "model_type": "qwen2", **keys}))
    with pytest.raises(
        CheckpointError, match=rf"{tmp_path} holds no config of a decoder .*{next(iter(keys))}"
    ):
        HfBackbone(HfConfig(pretrained=str(tmp_path)))


@pytest.mark.parametrize("activation", ["quick_gelu", "relu", "nope"])
def test_an_activation_that_no_config_can_write_is_refused(tmp_path: Path, activation: str) -> None:
    """Its checkpoint could not be opened."""
    saved_tower(tmp_path)
    edit(tmp_path / "config.json", hidden_act=activation)
    with pytest.raises(CheckpointError, match="describes other hidden_act"):
        SiglipEncoder(SiglipConfig(pretrained=str(tmp_path)))


def test_weights_of_other_shapes_are_listed(tmp_path: Path, plugins: Plugins) -> None:
    saved_tower(tmp_path)
    edit(tmp_path / "config.json", num_channels=1)
    part = ComponentSpec("understanding_encoders", "hf-vision", HfVisionConfig(pretrained=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"found \(24, 3, 4, 4\), expected \(24, 1, 4, 4\)"):
        ModelBuilder(plugins)(part)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": 0.5, "image_std": 0.5},
        {"image_mean": [0.5] * 3},
        {"image_mean": [0.5] * 4, "image_std": [0.5] * 4},
        {"image_mean": [0.5] * 3, "image_std": [0.5, 0, 0.5]},
        {"image_mean": [0.5, None, 0.5], "image_std": [0.5] * 3},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": "x"},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": "x"},
    ],
)
def test_a_damaged_processors_file_is_named(tmp_path: Path, settings: dict[str, Any]) -> None:
    saved_tower(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    for build in (
        lambda: SiglipEncoder(SiglipConfig(pretrained=str(tmp_path))),
        lambda: HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path))),
    ):
        with pytest.raises(CheckpointError, match=f"{tmp_path}: its processor's file does not say how"):
            build()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order is true; expected false"),
        ({"do_convert_grayscale": True}, "do_convert_grayscale is true; expected false"),
        ({"rescale_offset": True}, "rescale_offset is true; expected false"),
        ({"do_pad": True}, "do_pad is true; expected false"),
        ({"size": {"longest_edge": 40}}, r"size is {'longest_edge': 40}; expected height and width"),
        ({"size": {"shortest_edge": 40}}, r"size is {'shortest_edge': 40}; expected height and width"),
        ({"resample": 0}, r"resample is 0 \(nearest\); expected 2 or 3"),
        ({"resample": 2, "do_convert_rgb": True, "do_flip_channel_order": False, "do_pad": False}, ""),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 16}, ""),
        ({"do_pad": True, "size": {"longest_edge": 64}, "do_image_splitting": True, "resample": 1}, ""),
    ],
)
def test_a_processor_that_gives_other_pixels_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    saved_tower(tmp_path)
    numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**numbers, **settings}))
    for build in (
        lambda: SiglipEncoder(SiglipConfig(pretrained=str(tmp_path))),
        lambda: HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path))),
    ):
        if not said:
            build()
            continue
        with pytest.raises(CheckpointError, match=said):
            build()


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2", "ViT", "Bit", "DeiT", "Idefics2", "Idefics3"])
def test_what_transformers_processors_write_is_accepted(name: str, tmp_path: Path) -> None:
    """Bit's is DINOv2's."""
    processor = getattr(transformers, f"{name}ImageProcessorPil")()
    processor.save_pretrained(tmp_path)
    assert processor_settings(tmp_path)["mean"] == tuple(processor.image_mean)


def test_images_of_janus_are_fitted_inside_a_square(tmp_path: Path) -> None:
    processor = transformers.JanusImageProcessorPil(image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    settings = processor_settings(tmp_path)
    assert (settings["resize"], settings["fill"]) == ("letterbox", tuple(processor.background_color))


@pytest.mark.parametrize("option", [{"std": (0.5, 0.0, 0.5)}, {"mean": (0.5, float("nan"), 0.5)}])
def test_pixels_are_normalised_by_finite_numbers(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(option))}: .*expected three numbers"):
        PixelSpec(**option)


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), (0.485, 0.456, 0.406)])
def test_a_mean_that_a_family_does_not_have_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mean: tuple[float, float, float]
) -> None:
    """Whoever writes a size alone gets PixelSpec's mean."""
    keys: dict[str, Any] = {"model_type": "dinov2", **TOWER, "mlp_ratio": 2}
    AutoConfig.for_model(**keys).save_pretrained(tmp_path)
    pixels = PixelSpec(height=16, width=16, mean=mean, std=(0.229, 0.224, 0.225))
    HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path), pixels=pixels))
    assert ("'dinov2' usually has (0.485" in caplog.text) == (mean[0] == 0.5)
    processor = {"image_mean": [0.1] * 3, "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(DescriptionError) as error:
        HfVisionEncoder(HfVisionConfig(pretrained=str(tmp_path), pixels=pixels))
    assert error.value.drop == "pixels"


@pytest.mark.parametrize(
    "record", [{"model_type": "multi_modality"}, {"model_type": "janus-modular", "model": []}]
)
def test_a_description_without_a_tower_is_named(tmp_path: Path, record: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/config.json lacks .*Fetch it again"):
        SiglipEncoder(SiglipConfig(pretrained=str(tmp_path)))


REFERENCE = Path(__file__).parents[1] / "fixtures/reference"


def record_of_a_tower(format_name: str, select_layer: int) -> dict[str, Any]:
    if format_name == "published":
        record: dict[str, Any] = json.loads((REFERENCE / "config.json").read_text())
        record["vision_config"]["params"]["select_layer"] = select_layer
        return record
    encoder = {"name": "siglip", "activation": "gelu", "select_layer": select_layer}
    return {"model_type": "janus-modular", "model": {"understanding": {"encoder": encoder}}}


@pytest.mark.parametrize("format_name", ["published", "native"])
@pytest.mark.parametrize("described", [-23, 2, -1])
def test_the_layer_of_the_features_is_the_one_that_the_folder_describes(
    format_name: str, described: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(record_of_a_tower(format_name, described)))
    kept = 24 if described == -1 else 2
    for written in (None, kept, kept - 25):  # of 24 blocks, -23 is the second
        tower = chosen_tower(SiglipConfig(pretrained=str(tmp_path), select_layer=written), tmp_path)
        assert kept_layers(tower.layers, tower.select_layer) == kept
    with pytest.raises(DescriptionError, match=f"select_layer: found -5, expected {described}"):
        chosen_tower(SiglipConfig(pretrained=str(tmp_path), select_layer=-5), tmp_path)


def test_images_are_prepared_as_the_janus_that_the_tower_is_taken_from_has_them(tmp_path: Path) -> None:
    """Janus pads, where a processor of SigLIP's distorts; Janus-1.3B normalises in its tower."""
    published = tmp_path / "published"
    published.mkdir()
    record = json.loads((REFERENCE / "config.json").read_text())
    record["vision_config"]["params"] |= {"pixel_mean": [0.4] * 3, "pixel_std": [0.2] * 3}
    (published / "config.json").write_text(json.dumps(record))
    settings = json.loads((REFERENCE / "preprocessor_config.json").read_text()) | {"do_normalize": False}
    (published / "preprocessor_config.json").write_text(json.dumps(settings))

    native = tmp_path / "native"
    native.mkdir()
    pixels = {"height": 32, "width": 48, "resize": "letterbox", "mean": [0.4] * 3, "std": [0.2] * 3}
    encoder = {
        "name": "siglip",
        "feature_dim": 24,
        "layers": 1,
        "heads": 3,
        "intermediate": 40,
        "pixels": pixels,
    }
    config = {"model_type": "janus-modular", "model": {"understanding": {"encoder": encoder}}}
    (native / "config.json").write_text(json.dumps(config))

    converted = tmp_path / "transformers"
    JanusConfig(vision_config={**TOWER, "projection_dim": 8}).save_pretrained(converted)
    numbers = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "size": {"height": 16, "width": 16}}
    (converted / "preprocessor_config.json").write_text(json.dumps(numbers))

    for folder in (published, native, converted):
        with torch.device("meta"):
            spec = SiglipEncoder(SiglipConfig(pretrained=str(folder))).pixels
        assert (spec.resize, spec.normalize, spec.mean, spec.std) == (
            "letterbox", True, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2),
        )  # fmt: skip
        with pytest.raises(DescriptionError, match=r"pixels\.mean"):
            SiglipEncoder(SiglipConfig(pretrained=str(folder), pixels=PixelSpec(mean=(0.1, 0.1, 0.1))))
