"""The published format's config files, read as a native model config and written from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from janus_modular import CheckpointError, read_json
from janus_plugins.formats.preparation import (
    choose_template,
    read_pixels,
    require,
    require_begin_image,
    write_json,
    write_pixels,
)

LARGE = {"feature_dim": 1024, "layers": 24, "heads": 16, "intermediate": 4096, "patch_size": 16}
SO400M = {"feature_dim": 1152, "layers": 27, "heads": 16, "intermediate": 4304, "patch_size": 14}
TOWERS = {
    "siglip_large_patch16_384": LARGE,
    "siglip_so400m_patch14_384": SO400M,
    "siglip_so400m_patch14_224": SO400M,
}
ADAPTORS = {
    "identity": "identity",
    "linear": "linear",
    "mlp_gelu": "mlp",
    "low_high_hybrid_split_mlp_gelu": "hybrid",
}
SIDE = 384  # of drawn images; the published code knows no other


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json and preprocessor_config.json as a native model config.

    Raises:
        CheckpointError: something is missing, or is nothing that we have a part for.
    """
    config = read_json(folder / "config.json", CheckpointError)
    preprocessor = read_json(folder / "preprocessor_config.json", CheckpointError)
    try:
        tower = config["vision_config"]["params"]
        codes = config["gen_vision_config"]["params"]
        head = config["gen_head_config"]["params"]
        encoder = read_tower(config["vision_config"]["cls"], tower)
        encoder["pixels"] = read_pixels(preprocessor, tower)
        require(
            config["gen_vision_config"]["cls"] == "VQ-16", "published", "VQ-16", config["gen_vision_config"]
        )
        return {
            "understanding": {"encoder": encoder, "adaptor": _read_adaptor(config["aligner_config"])},
            "generation": {
                "name": "autoregressive",
                "height": SIDE,
                "width": SIDE,
                "tokenizer": {
                    "name": "llamagen",
                    "num_codes": codes["image_token_size"],
                    "code_dim": codes["n_embed"],
                },
                "adaptor": _read_adaptor(config["gen_aligner_config"]),
                "head": {"name": "mlp", "hidden": head["image_token_embed"]},
            },
            "backbone": {"name": "hf", "config": read_language(config["language_config"])},
            "processor": {"tokenizer": str(folder), "template": choose_template(folder, preprocessor)},
        }
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error}. Fetch it again.") from error


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    """Write config.json, preprocessor_config.json and processor_config.json.

    Raises:
        CheckpointError: the published code cannot hold one of the components.
    """
    blocks = config.get("together") or []
    require(not blocks, expected="causal attention (together: [])", actual=blocks, format_name="published")
    encoder, generation = config["understanding"]["encoder"], config["generation"]
    path = generation["name"]
    require(path == "autoregressive", "published", "the generation path autoregressive", path)
    tokenizer, head = generation["tokenizer"], generation["head"]
    names = (encoder["name"], tokenizer["name"], head["name"], config["backbone"]["name"])
    require(
        names == ("siglip", "llamagen", "mlp", "hf"),
        "published",
        "the components siglip, llamagen, mlp and hf",
        names,
    )
    _check_drawing(generation)
    language = write_language(config["backbone"]["config"])
    hidden_size = language["hidden_size"]
    pixels = write_pixels(encoder["pixels"], "published")
    size = encoder["pixels"]["height"]
    require(size == encoder["image_size"], "published", f"{encoder['image_size']} pixels a side", size)
    codes = {"image_token_size": tokenizer["num_codes"], "n_embed": tokenizer["code_dim"]}
    head_params = {"image_token_size": codes["image_token_size"], "n_embed": hidden_size}
    head_params["image_token_embed"] = head["hidden"] or hidden_size
    write_json(
        folder / "config.json",
        {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "vision_config": section("CLIPVisionTower", "vision", write_tower(encoder)),
            "aligner_config": _write_adaptor(
                "aligner", config["understanding"]["adaptor"], encoder["feature_dim"], hidden_size
            ),
            "gen_vision_config": section("VQ-16", "gen_vision", codes),
            "gen_aligner_config": _write_adaptor(
                "gen_aligner", generation["adaptor"], codes["n_embed"], hidden_size
            ),
            "gen_head_config": section("vision_head", "gen_head", head_params),
            "language_config": language,
        },
    )
    named = {"image_processor_type": "VLMImageProcessor", "processor_class": "VLChatProcessor"}
    write_json(folder / "preprocessor_config.json", {**named, "image_size": size, **pixels})
    tokens = config["processor"]["tokens"]
    require_begin_image(tokens, "published")
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "VLChatProcessor",
            "image_tag": tokens["placeholder"],
            "image_start_tag": tokens["begin_image"],
            "image_end_tag": tokens["end_image"],
            "num_image_tokens": (size // encoder["patch_size"]) ** 2,
            "add_special_token": False,
            "sft_format": "deepseek",
            "mask_prompt": True,
            "ignore_id": -100,
        },
    )


def read_language(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's section as transformers' keys; a Llama where it does not say."""
    ignored = ("torch_dtype", "dtype")
    language = {key: v for key, v in config.items() if not key.startswith("_") and key not in ignored}
    return {"model_type": "llama"} | language


def section(cls: str, model_type: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of config.json: a class and its parameters."""
    return {"cls": cls, "model_type": model_type, "params": dict(params)}


def read_tower(cls: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Read the published name of a tower as the options of ``siglip``."""
    name = params["model_name"]
    require(cls == "CLIPVisionTower", "published", "a CLIPVisionTower that we can read", cls)
    require(name in TOWERS, "published", f"towers called {', '.join(TOWERS)}", name)
    feature = params.get("select_feature", "patch")
    require(feature in ("same", "cls_patch"), "published", "features 'same' that we can read", feature)
    return {
        "name": "siglip",
        **TOWERS[name],
        "activation": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": params["image_size"],
        "select_layer": params["select_layer"],
    }


def write_tower(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a tower for the options of ``siglip``."""
    sizes = {key: encoder[key] for key in ("feature_dim", "layers", "heads", "intermediate", "patch_size")}
    names = [name for name, known in TOWERS.items() if known == sizes]
    require(bool(names), "published", f"towers of the sizes {TOWERS}", sizes)
    require(encoder["activation"] == "gelu", "published", "exact GELU", encoder["activation"])
    eps = encoder["layer_norm_eps"]
    require(eps == 1e-6, "published", "LayerNorms of 1e-6", eps)
    return {
        "model_name": names[0],
        "image_size": encoder["image_size"],
        "select_feature": "same",
        "select_layer": encoder["select_layer"],
    }


def _read_adaptor(section: Mapping[str, Any]) -> dict[str, Any]:
    params = section["params"]
    projector = params["projector_type"]
    require(projector in ADAPTORS, "published", f"projectors {', '.join(ADAPTORS)}", projector)
    depth = {"depth": params.get("depth", 1)} if "mlp" in projector else {}
    return {"name": ADAPTORS[projector], **depth}


def _write_adaptor(
    model_type: str, adaptor: Mapping[str, Any], input_dim: int, output_dim: int
) -> dict[str, Any]:
    projectors = {adaptor: projector for projector, adaptor in ADAPTORS.items()}
    require(adaptor["name"] in projectors, "published", f"adaptors {', '.join(projectors)}", adaptor["name"])
    require(adaptor.get("bias", True), "published", "biases in its linear adaptor", "none")
    require(
        not adaptor.get("begin"), "published", "a linear adaptor without a begin embedding", "begin: true"
    )
    params = {"projector_type": projectors[adaptor["name"]], "depth": adaptor.get("depth", 1)}
    return section("MlpProjector", model_type, {**params, "input_dim": input_dim, "n_embed": output_dim})


def _check_drawing(generation: Mapping[str, Any]) -> None:
    """Check that a generation path has the sizes that are constants of the published code."""
    size = (generation["height"], generation["width"])
    require(size == (SIDE, SIDE), "published", f"drawings of {SIDE}x{SIDE}", size)
    built_in = {
        "channels": 128,
        "channel_multipliers": [1, 1, 2, 2, 4],
        "residual_blocks": 2,
        "latent_channels": 256,
        "l2_norm": True,
    }
    tokenizer = generation["tokenizer"]
    options = {key: tokenizer[key] for key in built_in}
    require(options == built_in, "published", f"VQ-16 with {built_in}", options)
    dim, code_dim = generation.get("embedding_dim") or tokenizer["code_dim"], tokenizer["code_dim"]
    require(dim == code_dim, "published", f"an embedding of the codes' dimension, {code_dim}", dim)


def write_language(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Llama config with the older keys ``rope_theta`` and ``rope_scaling``."""
    require(config["model_type"] == "llama", "published", "a Llama", config["model_type"])
    language = {key: value for key, value in config.items() if key != "rope_parameters"}
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        language["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        language["rope_scaling"] = rope
    return language
