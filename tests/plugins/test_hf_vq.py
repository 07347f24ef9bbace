"""Emu3's tokenizer against transformers' own class, and the three formats that its weights come in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, Emu3Config, Emu3ForConditionalGeneration, Emu3VQVAE

from janus_modular import CheckpointError, ComponentSpec, ConfigError
from janus_modular.testing.common_checks import check_exports
from janus_modular.weights.pretrained import load_pretrained
from janus_plugins.image_tokenizers.hf_vq import HfVqConfig, HfVqTokenizer

KEYS: dict[str, Any] = {
    "model_type": "emu3_vqgan", "base_channels": 32, "channel_multiplier": [1, 2], "hidden_size": 64,
    "num_res_blocks": 1, "attn_resolutions": [1], "codebook_size": 64,
}  # fmt: skip


def tokenizer_of(**keys: Any) -> HfVqTokenizer:
    torch.manual_seed(0)
    tokenizer = HfVqTokenizer(HfVqConfig(config={**KEYS, **keys})).eval()
    for name, weight in tokenizer.state_dict().items():
        if weight.is_floating_point():  # variances, too, are to differ from 1
            weight.uniform_(0.5, 2) if name.endswith("running_var") else weight.normal_(std=0.2)
    return tokenizer


def loaded(path: Path, **config: Any) -> tuple[HfVqTokenizer, list[str]]:
    """Build what ``pretrained`` alone describes, and load it; return it and what was left over."""
    config_of = HfVqConfig(pretrained=str(path), **config)
    tokenizer = HfVqTokenizer(config_of).eval()
    report = load_pretrained(tokenizer, ComponentSpec("image_tokenizers", "hf-vq", config_of))
    return tokenizer, report.unexpected_keys


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("size", [(8, 8), (12, 20)])
def test_a_still_image_is_what_transformers_makes_of_it(frames: int, size: tuple[int, int]) -> None:
    ours = tokenizer_of(temporal_downsample_factor=frames)
    theirs = Emu3VQVAE(AutoConfig.for_model(**KEYS, temporal_downsample_factor=frames)).eval()
    theirs.load_state_dict(ours.model.state_dict())
    pixels = torch.rand(2, 3, *size) * 2 - 1

    codes = ours.encode(pixels)

    wanted = torch.stack(theirs.encode(pixels, [size] * 2).image_tokens)  # (N, h, w)
    assert torch.equal(codes, wanted.flatten(1))
    assert len(codes.unique()) > 2  # not one code for all
    decoded = ours.decode(codes, height=size[0], width=size[1])
    torch.testing.assert_close(decoded, theirs.decode(wanted))


@pytest.mark.slow
def test_the_exports_check_passes_with_several_threads() -> None:
    config = HfVqConfig(config={**KEYS, "channel_multiplier": [1, 1], "hidden_size": 32})
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # oneDNN's convolutions may then return channels last
    try:
        check_exports(HfVqTokenizer(config), torch.rand(2, 3, 8, 8) * 2 - 1, slot="image_tokenizers")
    finally:
        torch.set_num_threads(threads)


class Painter(nn.Module):
    """Decoding as a module's forward, which export takes."""

    def __init__(self, tokenizer: HfVqTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(codes, height=8, width=12)


@torch.no_grad()
def test_one_exported_program_paints_any_number_of_images() -> None:
    painter, codes = Painter(tokenizer_of()).eval(), torch.randint(64, (5, 24))
    images = torch.export.Dim("images", min=1, max=64)
    program = torch.export.export(painter, (codes[:3],), dynamic_shapes=({0: images},))
    torch.testing.assert_close(program.module()(codes), painter(codes))


@torch.no_grad()
def test_training_the_model_does_not_change_the_codes() -> None:
    tokenizer = tokenizer_of()
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    codes, state = tokenizer.encode(pixels), {k: v.clone() for k, v in tokenizer.state_dict().items()}

    nn.Sequential(tokenizer).train()  # as the training loop does with the whole model

    assert tokenizer.training
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert torch.equal(tokenizer.encode(pixels[1:]), codes[1:])
    torch.testing.assert_close(tokenizer.state_dict(), state, atol=0, rtol=0)


def test_the_defaults_are_the_published_sizes() -> None:
    with torch.device("meta"):
        tokenizer = HfVqTokenizer(HfVqConfig(config={"model_type": "emu3_vqgan"}))
        theirs = Emu3VQVAE(AutoConfig.for_model("emu3_vqgan"))
    assert (tokenizer.codebooks, tokenizer.code_dim, tokenizer.factor) == ((32768,), 4, 8)
    assert tokenizer.grid(720, 512) == (90, 64)
    sizes = [sum(weight.numel() for weight in one.parameters()) for one in (tokenizer, theirs)]
    assert sizes[0] == sizes[1]


def test_a_folder_of_the_tokenizer_alone_is_read(tmp_path: Path) -> None:
    source = tokenizer_of()
    source.model.save_pretrained(tmp_path)

    read, unexpected_keys = loaded(tmp_path)

    assert unexpected_keys == []
    torch.testing.assert_close(read.state_dict(), source.state_dict())
    assert read.config == source.config  # which builds it again without the folder
    file, _ = loaded(tmp_path / "model.safetensors", config=KEYS)
    torch.testing.assert_close(file.state_dict(), source.state_dict())


def test_the_tokenizer_inside_a_whole_emu3_is_read(tmp_path: Path) -> None:
    source = tokenizer_of()
    text = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 10, "pad_token_id": 0}
    whole = Emu3ForConditionalGeneration(
        Emu3Config(vq_config=KEYS, text_config=text, vocabulary_map={"<image>": 3})
    )
    whole.model.vqmodel.load_state_dict(source.model.state_dict())
    whole.save_pretrained(tmp_path)

    read, unexpected_keys = loaded(tmp_path)

    torch.testing.assert_close(read.state_dict(), source.state_dict())
    assert unexpected_keys
    assert not [name for name in unexpected_keys if "vqmodel" in name]


def test_what_the_authors_published_is_read(tmp_path: Path) -> None:
    source = tokenizer_of()
    source.model.save_pretrained(tmp_path)
    weights = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        attends = ".attn" in name
        name = re.sub(r"(down|up)_block\.", "", name).replace("middle_block.", "mid.")
        name = name.replace(".attn_norm.", ".attn_1.norm.")
        name = re.sub(r"\.attn_norms\.(\d+)\.", r".attn.\1.norm.", name)
        name = re.sub(r"\.([qkv])_proj\.", r".\1.", name).replace(".out_proj.", ".proj_out.")
        # projections are convolutions of one pixel there; spatial norms have such convolutions in both
        weights[name] = weight[..., None, None] if attends and weight.ndim == 2 else weight
    assert {"encoder.mid.attn_1.q.weight", "decoder.up.1.attn.0.norm.conv_y.weight"} <= set(weights)
    assert weights["encoder.down.1.attn.0.proj_out.weight"].shape == (64, 64, 1, 1)
    save_file(weights, tmp_path / "model.safetensors")
    theirs = {
        "model_type": "Emu3VisionVQ", "architectures": ["Emu3VisionVQModel"], "ch": 32, "ch_mult": [1, 2],
        "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"}, "torch_dtype": "float32",
        "z_channels": 4, "double_z": False, "dropout": 0.0, "num_res_blocks": 1, "attn_resolutions": [1],
        "codebook_size": 64, "embed_dim": 4, "temporal_downsample_factor": 4,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(theirs))

    read, unexpected_keys = loaded(tmp_path)

    assert unexpected_keys == []
    torch.testing.assert_close(read.state_dict(), source.state_dict())


def test_missing_and_unexpected_weights_are_errors(tmp_path: Path) -> None:
    tokenizer_of().model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["decoder.conv_in.weight"]
    save_file(weights | {"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n.*decoder\.conv_in\.weight"):
        loaded(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no codebook"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give config"),
        ({"codebook_size": 64}, "give config"),
        ({"model_type": "chameleon_vqgan"}, r"name: vqgan, num_codes: 8192.*vqgan\.ckpt"),
        ({"model_type": "janus_vqgan"}, "read by llamagen"),
        ({"model_type": "glm_image_vqmodel"}, "cannot draw"),
        (
            {**KEYS, "base_chanels": 32},
            "config.base_chanels: 'emu3_vqgan' has no such key. Did you mean 'base_channels'",
        ),
        ({**KEYS, "hidden_size": 32}, "hidden_size 32, but the last level has 64 channels"),
        ({**KEYS, "embed_dim": 8}, "latent_channels 4 and embed_dim 8"),
    ],
)
def test_unsupported_tokenizer_configs_are_errors_with_a_hint(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HfVqTokenizer(HfVqConfig(config=keys))


def test_sizes_that_do_not_fit_are_errors_that_name_both_numbers() -> None:
    tokenizer = tokenizer_of()
    with pytest.raises(ValueError, match="9x8 is no multiple of 2"):
        tokenizer.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="5 codes do not fill a grid of 4x4"):
        tokenizer.decode(torch.zeros(1, 5, dtype=torch.long), height=8, width=8)


def test_losses_are_those_of_vq_vae() -> None:
    tokenizer = tokenizer_of()
    pixels = torch.rand(2, 3, 8, 12) * 2 - 1
    codes = tokenizer.encode(pixels)
    decoded = tokenizer.decode(codes, height=8, width=12)
    distance = (tokenizer.codebook_embeddings()[codes] - tokenizer.latents(pixels)).square().mean()

    losses = tokenizer.losses(pixels)

    torch.testing.assert_close(losses["pixels"], (decoded - pixels).square().mean())
    torch.testing.assert_close(losses["codebook"], distance)
    torch.testing.assert_close(losses["commitment"], 0.25 * distance)


def test_a_few_steps_on_its_losses_paint_an_image_better(taught: Callable[..., list[float]]) -> None:
    torch.manual_seed(0)
    tokenizer = HfVqTokenizer(HfVqConfig(config=KEYS))
    nn.init.uniform_(tokenizer.model.quantize.embedding.weight, -1, 1)
    history = taught(tokenizer, lr=3e-3, rows=2)
    assert history[-1] < 0.6 * history[0]
