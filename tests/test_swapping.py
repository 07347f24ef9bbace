"""Any encoder over any image tokenizer over any backbone, chosen by words on the command line alone."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from janus_modular import (
    Message,
    PictureToDraw,
    PictureToRead,
    PluginError,
    Plugins,
    Sample,
    Text,
    default_plugins,
)
from janus_modular.batch import collate
from janus_modular.cli.app import app
from janus_modular.compose import compose
from janus_modular.config import load, resolve
from janus_modular.janus import Janus
from janus_modular.schema import ModelConfig

PLUGIN = Path(__file__).parents[1] / "plugins/examples/efficientnet_lite0.py"
SIDE = 32  # pixels of every picture here

# What one would type to put each part into the shipped config `tiny`, as small as the families take.
VISION = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48"
ENCODERS = {
    "siglip": [
        "understanding.encoder=siglip",
        *(f"understanding.encoder.{option}" for option in ("width=32", "layers=2", "heads=2")),
        *(f"understanding.encoder.{option}" for option in ("intermediate=48", f"image_size={SIDE}")),
        f"understanding.encoder.pixels={{height: {SIDE}, width: {SIDE}}}",
    ],
    "siglip2": [
        "understanding.encoder=hf-vision",
        f"understanding.encoder.config={{model_type: siglip2_vision_model, {VISION}, patch_size: 8, "
        "num_patches: 16}",
    ],
    "clip": [
        "understanding.encoder=hf-vision",
        f"understanding.encoder.config={{model_type: clip_vision_model, {VISION}, patch_size: 8, "
        f"image_size: {SIDE}}}",
    ],
    "dinov2": [
        "understanding.encoder=hf-vision",
        f"understanding.encoder.config={{model_type: dinov2, {VISION}, patch_size: 8, image_size: {SIDE}}}",
    ],
    "efficientnet-lite0": [
        "understanding.encoder=efficientnet-lite0",
        f"understanding.encoder.height={SIDE}",
        f"understanding.encoder.width={2 * SIDE}",
    ],
}
LLAMAGEN = [
    "generation.tokenizer=llamagen",
    *(f"generation.tokenizer.{option}" for option in ("channels=8", "residual_blocks=1", "num_codes=32")),
    "generation.tokenizer.latent_channels=16",
]
TOKENIZERS = {
    "vq": ["generation.tokenizer={name: vq, channels: [8, 8, 16, 16], num_codes: 32, code_width: 4}"],
    "vq16": LLAMAGEN,  # its multipliers are the default
    "vq8": [*LLAMAGEN, "generation.tokenizer.channel_multipliers=[1, 2, 2, 4]"],
}
CODES = {"vq": 16, "vq16": 4, "vq8": 16}  # of one picture: (32 / factor) squared
DECODER = (
    "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, vocab_size: 300, max_position_embeddings: 256"
)
BACKBONES = {
    "llama": "",
    "qwen2": "",
    "qwen3": "head_dim: 16",  # not hidden_size / heads
    "mistral": "head_dim: 8, sliding_window: 16",
    "phi3": "",
    "gemma3_text": "head_dim: 16, sliding_window: 8, layer_types: [sliding_attention, full_attention]",
}

COMBINATIONS = list(product(ENCODERS, TOKENIZERS, BACKBONES))
EVERY_PART_ONCE = list(zip([*ENCODERS, "siglip"], [*TOKENIZERS, *TOKENIZERS], BACKBONES, strict=True))


def overrides(encoder: str, tokenizer: str, backbone: str) -> list[str]:
    more = f", {BACKBONES[backbone]}" if BACKBONES[backbone] else ""
    return [
        *ENCODERS[encoder],
        *TOKENIZERS[tokenizer],
        f"backbone.config={{model_type: {backbone}, {DECODER}{more}}}",
    ]


@pytest.fixture
def with_plugin(plugins: Plugins) -> Plugins:
    plugins.add_file(PLUGIN)
    return plugins


def build(combination: tuple[str, str, str], plugins: Plugins):
    torch.manual_seed(0)
    raw = load("tiny", overrides(*combination), plugins)
    return compose(resolve(raw, ModelConfig, plugins), plugins)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def cli(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_any_three_parts_learn_together(combination: tuple[str, str, str]):
    words = overrides(*combination)
    said = cli("--plugin", str(PLUGIN), "config", "validate", "tiny", *words)
    assert "tiny is valid." in said

    model, processor = build(combination, default_plugins())
    encoder, backbone = model.understanding.encoder, model.backbone
    is_called = getattr(encoder, "model", encoder)
    assert combination[0].split("-")[0] in type(is_called).__name__.lower()
    assert backbone.model.config.model_type == combination[2]
    mixed = Sample(
        [
            Message("user", [PictureToRead(picture(0)), Text("Draw it again.")]),
            Message("assistant", [Text("Here it is.", supervised=True), PictureToDraw(picture(1))]),
        ]
    )
    words_only = Sample([Message("user", [Text("a?")]), Message("assistant", [Text("b", supervised=True)])])
    batch = collate([processor.sequence(mixed), processor.sequence(words_only)], pad=processor.pad_id)
    losses = model(batch).losses

    assert losses["image"].shape == (CODES[combination[1]],)
    assert all(bool(torch.isfinite(loss).all()) for loss in losses.values())
    torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
    taught = ("understanding.adaptor", "generation.embedding", "generation.adaptor", "generation.head")
    for name, parameter in model.named_parameters():
        if name.startswith("generation.tokenizer."):
            assert parameter.grad is None, f"{name}: its codes are targets"
        elif name.startswith((*taught, "backbone.")):
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
            assert bool(parameter.grad.any()), f"{name} learns nothing"
    assert any(p.grad is not None and bool(p.grad.any()) for p in encoder.parameters())


@pytest.mark.parametrize("combination", EVERY_PART_ONCE, ids="-".join)
def test_what_was_put_together_answers_draws_and_comes_back_from_disk(
    combination: tuple[str, str, str], with_plugin: Plugins, tmp_path: Path
):
    """From Python, then the same from the command line on the saved checkpoint."""
    janus = Janus.of(*build(combination, with_plugin), with_plugin)
    answer = janus.chat("What is this?", [picture(2)], max_tokens=5)
    drawn = janus.draw("a square", guidance=2.0, seed=3)
    assert [one.size for one in drawn] == [(SIDE, SIDE)]

    janus.save_pretrained(tmp_path / "model")
    picture(2).save(tmp_path / "asked.png")
    plugin = ("--plugin", str(PLUGIN))
    model = str(tmp_path / "model")
    asked = ("--image", str(tmp_path / "asked.png"), "--max-tokens", "5", "--json")
    said = cli(*plugin, "chat", model, "What is this?", *asked)
    assert json.loads(said)["answer"] == answer
    out = tmp_path / "drawn.png"
    cli(*plugin, "draw", model, "a square", "--guidance", "2", "--seed", "3", "-n", "1", "-o", str(out))
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(drawn[0]))


def test_a_checkpoint_names_the_plugin_file_that_it_needs(plugins: Plugins, tmp_path: Path):
    """Also where only this model was given the plugin, in a notebook say."""
    own = Plugins(plugins.announcements)
    own.add_file(PLUGIN)
    janus = Janus.of(*build(("efficientnet-lite0", "vq", "llama"), own), own)
    janus.save_pretrained(tmp_path / "model")
    assert Janus.from_pretrained(tmp_path / "model", plugins=own).model
    with pytest.raises(PluginError, match=r"--plugin efficientnet_lite0.py"):
        Janus.from_pretrained(tmp_path / "model")
