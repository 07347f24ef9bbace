"""The format that the authors of JanusFlow published: ``model_type: multi_modality``, as that of Janus.

The image autoencoder is no part of it: the published code takes Stable Diffusion XL's from the hub, and so
does this format. One that is written lies beside the rest, as ``vae.``, with its options in config.json. So
do the options that training alone reads, and the weights of its alignment, as ``aligner.``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_modular import (
    CheckpointError,
    CheckpointFormat,
    ComponentConfig,
    Registry,
    hookimpl,
    read_json,
)
from janus_plugins.formats.preparation import (
    choose_template,
    read_pixels,
    require,
    write_json,
    write_pixels,
)
from janus_plugins.formats.published_config import (
    SIDE,
    read_language,
    read_tower,
    section,
    write_language,
    write_tower,
)
from janus_plugins.formats.renaming import Renaming
from janus_plugins.formats.tower import Tower

FORMAT = "janusflow"
AUTOENCODER = "stabilityai/sdxl-vae"  # that of the published code

TRAINING = ("time_mean", "time_std", "align_layer", "align_dim", "align_weight")
"""Options of the generation path that the published code, which only draws, does not know."""

TOWER = Tower("vision_und_enc_model.vision_tower.")
NAMES = Renaming(
    [
        *TOWER.rows,
        ("beg_of_und_embed", "understanding.adaptor.begin"),
        ("vision_und_enc_aligner.", "understanding.adaptor.layers."),
        ("vision_gen_enc_model.", "generation.encoder."),
        ("vision_gen_enc_aligner.", "generation.adaptor.layers."),
        ("vision_gen_dec_aligner_norm.", "generation.decoder_norm."),
        ("vision_gen_dec_aligner.", "generation.decoder_adaptor."),
        ("vision_gen_dec_model.", "generation.decoder."),
        ("vae.", "generation.autoencoder."),
        ("aligner.", "generation.aligner."),
        ("language_model.", "backbone.model."),
    ]
)


@dataclass
class JanusFlowConfig(ComponentConfig):
    """The format has no options."""


class JanusFlowFormat:
    """Reads and writes JanusFlow's checkpoints."""

    model_type = "multi_modality"

    def __init__(self, config: JanusFlowConfig) -> None:
        self.config = config

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Return True for a config.json with this model type and JanusFlow's sections."""
        return config.get("model_type") == self.model_type and "vision_gen_enc_config" in config

    def to_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield native names; fused queries, keys and values become three views."""
        for name in weights:
            if not name.startswith(TOWER.pool):
                yield from TOWER.to_native(name, NAMES.to_native(name) or name, weights[name])

    def from_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield published names, with zeros for unused weights and a copy for a tied head."""
        for name in weights:
            if TOWER.is_fused(name):
                continue
            published = NAMES.from_native(name)
            if published is None:
                raise CheckpointError(f"the format '{FORMAT}' cannot hold {name}.")
            yield published, TOWER.from_native(name, published, weights)
        if "backbone.model.lm_head.weight" not in weights:
            yield "language_model.lm_head.weight", weights["backbone.model.model.embed_tokens.weight"]
        yield from TOWER.unused(weights)

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Read config.json and preprocessor_config.json as a native model config.

        Raises:
            CheckpointError: something is missing, or has no component here.
        """
        config = read_json(folder / "config.json", CheckpointError)
        preprocessor = read_json(folder / "preprocessor_config.json", CheckpointError)
        try:
            tower = config["vision_und_enc_config"]["params"]
            encoder = read_tower(config["vision_und_enc_config"]["cls"], tower)
            encoder["pixels"] = read_pixels(preprocessor, tower)
            return {
                "understanding": {"encoder": encoder, "adaptor": {"name": "linear", "begin": True}},
                "generation": {
                    **_read_flow(config["vision_gen_enc_config"], config["vision_gen_dec_config"]),
                    **config.get("training_config", {}),
                    "autoencoder": config.get("vae_config")
                    or {"name": "autoencoder-kl", "pretrained": AUTOENCODER},
                },
                "backbone": {"name": "hf", "config": read_language(config["language_config"])},
                "processor": {
                    "tokenizer": str(folder),
                    "template": choose_template(folder, preprocessor),
                    "tokens": {"begin_image": None},  # the adaptor and the time stand in its place
                },
            }
        except KeyError as error:
            raise CheckpointError(f"{folder / 'config.json'} lacks {error}. Fetch it again.") from error

    def write_config(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write config.json, preprocessor_config.json and processor_config.json.

        Raises:
            CheckpointError: the published code cannot hold one of the components.
        """
        understanding, generation = config["understanding"], config["generation"]
        encoder, adaptor = understanding["encoder"], understanding["adaptor"]
        names = (encoder["name"], adaptor["name"], generation["name"], config["backbone"]["name"])
        expected = ("siglip", "linear", "rectified-flow", "hf")
        require(names == expected, FORMAT, f"the components {', '.join(expected)}", names)
        options = {key: adaptor[key] for key in ("begin", "bias")}
        require(all(options.values()), FORMAT, "a linear adaptor with begin and bias", options)
        tokens = config["processor"]["tokens"]
        require(tokens["begin_image"] is None, FORMAT, "images that begin without a token", tokens)
        language = write_language(config["backbone"]["config"])
        encoder_section, decoder_section = _write_flow(generation, language["hidden_size"])
        pixels, size = write_pixels(encoder["pixels"], FORMAT), encoder["pixels"]["height"]
        require(size == encoder["image_size"], FORMAT, f"{encoder['image_size']} pixels a side", size)
        write_json(
            folder / "config.json",
            {
                "architectures": ["MultiModalityCausalLM"],
                "model_type": self.model_type,
                "vision_und_enc_config": section("CLIPVisionTower", "vision_und_enc", write_tower(encoder)),
                "vision_gen_enc_config": encoder_section,
                "vision_gen_dec_config": decoder_section,
                "training_config": {key: generation[key] for key in TRAINING},
                "vae_config": {**generation["autoencoder"], "pretrained": None, "revision": None},
                "language_config": language,
            },
        )
        named = {"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}
        write_json(folder / "preprocessor_config.json", {**named, "image_size": size, **pixels})
        write_json(
            folder / "processor_config.json",
            {
                "processor_class": "VLChatProcessor",
                "image_tag": tokens["placeholder"],
                "image_end_tag": tokens["end_image"],
                "num_image_tokens": (size // encoder["patch_size"]) ** 2,
                "add_special_token": False,
                "sft_format": "deepseek",
                "mask_prompt": True,
                "ignore_id": -100,
            },
        )


def _read_flow(encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Read the sections of the U-ViT as the options of ``rectified-flow``.

    Raises:
        CheckpointError: the U-ViT is another one.
    """
    for part, cls in ((encoder, "ShallowUViTEncoder"), (decoder, "ShallowUViTDecoder")):
        require(part["cls"] == cls, FORMAT, f"a {cls}", part["cls"])
        require(part["params"].get("norm_eps", 1e-6) == 1e-6, FORMAT, "norms of 1e-6", part["params"])
    first, last = encoder["params"], decoder["params"]
    patch = first["kernel_size"]
    fixed = (first["stride"], first.get("padding", 0), last["upsamples"])
    require(fixed == (patch, 0, 1) and patch == 2, FORMAT, "patches of 2 x 2 without padding", fixed)
    require(len(first["block_out_channels"]) == 1, FORMAT, "one resolution", first["block_out_channels"])
    return {
        "name": "rectified-flow",
        "height": SIDE,
        "width": SIDE,
        "channels": first["block_out_channels"][0],
        "patch_size": patch,
        "encoder_blocks": first["layers_in_middle"],
        "decoder_blocks": last["layers_in_middle"],
        "adaptor": {"name": "linear"},
    }


def _write_flow(path: Mapping[str, Any], hidden_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the sections of the U-ViT's encoder and decoder."""
    require(path["hidden_condition"], FORMAT, "hidden_condition", "hidden_condition: false")
    size = (path["height"], path["width"])
    require(size == (SIDE, SIDE), FORMAT, f"drawings of {SIDE}x{SIDE}", size)
    require(path["patch_size"] == 2, FORMAT, "patches of 2 x 2", path["patch_size"])
    adaptor = path["adaptor"]
    is_linear = adaptor["name"] == "linear" and adaptor["bias"] and not adaptor["begin"]
    require(is_linear, FORMAT, "a linear adaptor with bias", adaptor)
    channels = path["channels"]
    shared = {"block_out_channels": [channels], "hidden_size": hidden_size, "norm_eps": 1e-6}
    latents = path["autoencoder"].get("latent_channels", 4)
    encoder = {
        **shared,
        "input_channels": latents,
        "kernel_size": 2,
        "stride": 2,
        "padding": 0,
        "layers_in_middle": path["encoder_blocks"],
    }
    decoder = {
        **shared,
        "in_channels": channels,
        "out_channels": latents,
        "layers_in_middle": path["decoder_blocks"],
        "upsamples": 1,
    }
    return (
        section("ShallowUViTEncoder", "vision_gen_enc", encoder),
        section("ShallowUViTDecoder", "vision_gen_dec", decoder),
    )


@hookimpl
def register_formats(registry: Registry[CheckpointFormat]) -> None:
    """Register this format."""
    registry.add("janusflow", JanusFlowFormat, JanusFlowConfig)
