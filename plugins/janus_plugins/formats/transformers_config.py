"""transformers' config files of Janus, read as a native model config and written from one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import JanusConfig

from janus_modular import CheckpointError, open_weights
from janus_plugins.formats import preparation
from janus_plugins.formats.preparation import choose_template, read_pixels, token_ids, write_json
from janus_plugins.formats.transformers_processor import read_preprocessor, write_processor

require = partial(preparation.require, format_name="transformers")


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json and the image processor's settings as a native model config.

    Raises:
        CheckpointError: something is missing, or no component supports it.
    """
    try:
        config = JanusConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'} is no config of transformers' Janus: {error!s:.400}"
        ) from error
    vision, codes, text = config.vision_config, config.vq_config, config.text_config
    _check_vision(vision)
    require(not codes.double_latent, expected="single latents", actual="double_latent")
    preprocessor = read_preprocessor(folder)
    side = codes.num_patches * 2 ** (len(codes.channel_multiplier) - 1)  # of a drawing, in pixels
    language = text.to_dict() | {"tie_word_embeddings": _is_tied(folder, config.tie_word_embeddings)}
    for key in ("dtype", "torch_dtype", "architectures", "_name_or_path", "transformers_version"):
        language.pop(key, None)
    return {
        "understanding": {
            "encoder": {
                "name": "siglip",
                "feature_dim": vision.hidden_size,
                "layers": vision.num_hidden_layers,
                "heads": vision.num_attention_heads,
                "intermediate": int(vision.hidden_size * vision.mlp_ratio),
                "patch_size": vision.patch_size,
                "image_size": vision.image_size,
                "activation": vision.hidden_act,
                "layer_norm_eps": vision.layer_norm_eps,
                "pixels": read_pixels(preprocessor, {}),
            },
            "adaptor": {"name": "mlp", "depth": vision.depth},
        },
        "generation": {
            "name": "autoregressive",
            "height": side,
            "width": side,
            "tokenizer": {
                "name": "llamagen",
                "channels": codes.base_channels,
                "channel_multipliers": list(codes.channel_multiplier),
                "residual_blocks": codes.num_res_blocks,
                "latent_channels": codes.latent_channels,
                "num_codes": codes.num_embeddings,
                "code_dim": codes.embed_dim,
            },
            "adaptor": {"name": "mlp", "depth": codes.num_hidden_layers},
            "head": {"name": "mlp", "hidden": codes.projection_dim},
        },
        "backbone": {"name": "hf", "config": language},
        "processor": {"tokenizer": str(folder), "template": choose_template(folder, preprocessor)},
    }


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write all of the format's config files; the tokenizer's are there already.

    Raises:
        CheckpointError: transformers cannot hold one of the components.
    """
    blocks = config.get("together") or []
    require(not blocks, expected="causal attention (together: [])", actual=blocks)
    preparation.require_begin_image(config["processor"]["tokens"], "transformers")
    _check_components(config)
    understanding, generation = config["understanding"], config["generation"]
    encoder, tokenizer, backbone = understanding["encoder"], generation["tokenizer"], config["backbone"]
    hidden_size = backbone["config"]["hidden_size"]
    patches = encoder["image_size"] // encoder["patch_size"]
    written = JanusConfig(
        vision_config={
            "hidden_size": encoder["feature_dim"],
            "num_hidden_layers": _kept_layers(encoder),
            "num_attention_heads": encoder["heads"],
            "image_size": encoder["image_size"],
            "patch_size": encoder["patch_size"],
            "hidden_act": encoder["activation"],
            "layer_norm_eps": encoder["layer_norm_eps"],
            "mlp_ratio": _ratio(encoder["feature_dim"], encoder["intermediate"]),
            "projection_dim": hidden_size,
            "depth": understanding["adaptor"]["depth"],
            "num_image_tokens": patches**2,
        },
        vq_config={
            "embed_dim": tokenizer["code_dim"],
            "num_embeddings": tokenizer["num_codes"],
            "latent_channels": tokenizer["latent_channels"],
            "base_channels": tokenizer["channels"],
            "channel_multiplier": tokenizer["channel_multipliers"],
            "num_res_blocks": tokenizer["residual_blocks"],
            "num_patches": patches,
            "projection_dim": hidden_size,
            "num_hidden_layers": generation["adaptor"]["depth"],
            "image_token_embed_dim": hidden_size,
        },
        text_config=dict(backbone["config"]),
        tie_word_embeddings=bool(backbone["config"].get("tie_word_embeddings", False)),
        image_token_id=token_ids(folder)[config["processor"]["tokens"]["placeholder"]],
        architectures=["JanusForConditionalGeneration"],
    )
    write_json(folder / "config.json", written.to_diff_dict() | {"model_type": "janus"})
    write_processor(config, folder, num_image_tokens=patches**2)


def _check_components(config: Mapping[str, Any]) -> None:
    understanding, generation = config["understanding"], config["generation"]
    path = generation["name"]
    require(path == "autoregressive", expected="the generation path autoregressive", actual=path)
    encoder, tokenizer, head = understanding["encoder"], generation["tokenizer"], generation["head"]
    backbone = config["backbone"]
    components = (
        encoder,
        understanding["adaptor"],
        generation,
        tokenizer,
        generation["adaptor"],
        head,
        backbone,
    )
    names = tuple(component["name"] for component in components)
    expected = ("siglip", "mlp", "autoregressive", "llamagen", "mlp", "mlp", "hf")
    require(names == expected, expected=f"the components {', '.join(expected)}", actual=names)
    require(
        encoder["activation"] == "gelu",
        expected="exact GELU in encoder and adaptor",
        actual=encoder["activation"],
    )
    side, height = encoder["image_size"], encoder["pixels"]["height"]
    require(height == side, expected=f"images of {side} pixels a side", actual=height)
    require(tokenizer["l2_norm"], expected="codes of unit length", actual="l2_norm: false")
    hidden_size = backbone["config"]["hidden_size"]
    require(
        head["hidden"] in (None, hidden_size),
        expected=f"a head of the backbone's hidden_size, {hidden_size}",
        actual=head["hidden"],
    )
    code_dim = generation.get("embedding_dim") or tokenizer["code_dim"]
    require(
        code_dim == tokenizer["code_dim"], expected="an embedding of the codes' dimension", actual=code_dim
    )
    patches = encoder["image_size"] // encoder["patch_size"]
    factor = 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    size = (generation["height"], generation["width"])
    require(
        size == (patches * factor,) * 2,
        expected=f"drawings of {patches} codes a side, as the encoder has",
        actual=size,
    )


def _check_vision(vision: Any) -> None:
    require(not vision.use_qk_norm, expected="attention without norms", actual="use_qk_norm")
    require(vision.attention_bias, expected="attention with biases", actual="attention_bias: false")
    sizes = (vision.image_size, vision.patch_size)
    require(all(isinstance(size, int) for size in sizes), expected="square images", actual=sizes)


def _is_tied(folder: Path, in_config: bool) -> bool:
    """Return whether the text head is the embedding: the config's default is True even where it is not."""
    return in_config and "lm_head.weight" not in open_weights(folder)


def _kept_layers(encoder: Mapping[str, Any]) -> int:
    chosen, layers = encoder["select_layer"], encoder["layers"]
    return min(layers, chosen if chosen > 0 else layers + chosen + 1)


def _ratio(hidden_size: int, intermediate: int) -> float:
    """Return a ratio from which transformers' ``int(hidden_size * ratio)`` gives the same number."""
    ratio = intermediate / hidden_size
    return ratio if int(hidden_size * ratio) == intermediate else (intermediate + 0.5) / hidden_size
