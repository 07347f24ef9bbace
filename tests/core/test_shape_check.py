"""`config validate` runs the understanding path on an image: wrong shapes are errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, SiglipVisionConfig
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.config import shipped
from janus_modular.plugins import Plugins, set_default_plugins

PLUGIN = """
from dataclasses import dataclass
import torch
from janus_modular import ComponentConfig, PixelSpec, hookimpl

@dataclass
class OddConfig(ComponentConfig):
    '''Options.'''

class OddEncoder(torch.nn.Module):
    feature_dim = 12
    pixels = PixelSpec(height=16, width=24)

    def __init__(self, config):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 12, 8, stride=8)

    def grid(self, height, width):
        return height // 8, width // 8

    def forward(self, pixels):
        return self.layer(pixels).flatten(2).transpose(1, 2)

class OddAdaptor(torch.nn.Module):
    def __init__(self, config, input_dim, output_dim):
        super().__init__()
        self.layer = torch.nn.Linear(input_dim, output_dim)

    def num_tokens(self, grid):
        return grid[0] * grid[1]

    def forward(self, features, grid):
        return self.layer(features)

@hookimpl
def register_understanding_encoders(registry):
    registry.add("odd", OddEncoder, OddConfig)

@hookimpl
def register_adaptors(registry):
    registry.add("odd", OddAdaptor, OddConfig)
"""


def validated(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["config", "validate", *words])
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Odd", "Odd", ""),
        (
            "height // 8, width // 8",
            "height // 8, width // 4",
            "encoder 'odd' of odd.py returns (1, 6, 12) for",
        ),
        ("feature_dim = 12", "feature_dim = 10", "encoder 'odd' of odd.py returns (1, 6, 12) for"),
        (
            "self.layer(features)",
            "self.layer(features)[:, 1:]",
            "adaptor 'odd' of odd.py returns (1, 5, 64) for",
        ),
        ("self.layer(features)", "(self.layer(features),)", "adaptor 'odd' of odd.py returns tuple for"),
        ("grid[0] * grid[1]", "grid[0]", "adaptor 'odd' of odd.py returns (1, 6, 64) for"),
        ("def forward(self, features, grid)", "def forward(self, features)", "its forward takes (features)"),
        ("self.layer(features)", "self.layer(features) * features.sum().item()", ""),  # no number on meta
    ],
)
def test_a_component_that_violates_its_interface_is_named(
    tmp_path: Path, plugins: Plugins, old: str, new: str, said: str
) -> None:
    assert old in PLUGIN
    file = tmp_path / "odd.py"
    file.write_text(PLUGIN.replace(old, new))
    plugins.add_file(file)
    set_default_plugins(plugins)
    code, error = validated("tiny", "understanding.encoder=odd", "understanding.adaptor=odd")
    assert code == (2 if said else 0), error
    assert said in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["pixels={height: 4, width: 4}"],
            "has 0x0 features of an image of 4x4 pixels; expected at least 1x1",
        ),
        (["pixels={height: -3, width: 8}"], "understanding.encoder.pixels.height: -3; expected at least 1"),
    ],
)
@pytest.mark.parametrize(
    "encoder",
    [
        "{name: siglip, feature_dim: 32, layers: 1, heads: 2, intermediate: 32, patch_size: 8,"
        " image_size: 16}",
        "{name: hf-vision, config: {model_type: dinov2, hidden_size: 32, num_hidden_layers: 1,"
        " num_attention_heads: 2, patch_size: 8, image_size: 16}}",
    ],
)
def test_images_that_are_too_small_to_read_are_refused(encoder: str, words: list[str], said: str) -> None:
    line = ["tiny", f"understanding.encoder={encoder}"]
    assert validated(*line)[0] == 0
    code, error = validated(*line, *(f"understanding.encoder.{word}" for word in words))
    assert code == 2
    assert said in error


SIZES = "hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 4, vocab_size: 320"
LLAMA = f"{SIZES}, max_position_embeddings: 512, intermediate_size: 128"


@pytest.mark.parametrize(
    ("family", "problem"),
    [
        (f"llama, {LLAMA}", ""),
        (f"llama, {LLAMA}, num_key_value_heads: 3", "fails with a row of four positions, (1, 4, 64)"),
        (f"qwen2, {LLAMA}, num_key_value_heads: 3", "fails with a row of four positions, (1, 4, 64)"),
        (
            "gptj, n_embd: 64, n_layer: 2, n_head: 4, vocab_size: 320, n_positions: 512, rotary_dim: 32",
            "fails with a row of four positions, (1, 4, 64)",
        ),
        (f"bloom, {SIZES}", "whose config has no max_position_embeddings; expected"),
        ("mamba, hidden_size: 64, vocab_size: 320", "whose config has no max_position_embeddings; expected"),
    ],
)
def test_a_backbone_that_cannot_read_a_row_is_named(family: str, problem: str) -> None:
    code, error = validated("tiny", f"backbone={{name: hf, config: {{model_type: {family}}}}}")
    assert code == (2 if problem else 0), error
    assert problem in error


@pytest.mark.parametrize(
    "family",
    [f"bert, {LLAMA}", f"opt, {LLAMA.partition(', inter')[0]}, word_embed_proj_dim: 64"],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_backbone_that_does_not_keep_packed_sequences_apart_is_refused(
    family: str, is_wrapped: bool
) -> None:
    backbone = f"{{name: hf, config: {{model_type: {family}}}}}"
    if is_wrapped:
        backbone = f"{{name: lora, backbone: {backbone}}}"
    code, error = validated(
        "train/janus_pro/stage1", "model=tiny", "length=256", f"model.backbone={backbone}"
    )
    assert code == 2
    assert "model.backbone: " in error
    assert "does not keep sequences apart that share a row" in error


def test_a_config_is_compared_with_the_folders_that_it_names(tmp_path: Path) -> None:
    """`info` refuses the same."""
    llama, siglip = f"{tmp_path}/llama", f"{tmp_path}/siglip"
    LlamaConfig(vocab_size=320, hidden_size=32, num_attention_heads=4, num_hidden_layers=1).save_pretrained(
        llama
    )
    SiglipVisionConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1).save_pretrained(siglip)
    heads = f"understanding.encoder={{name: siglip, heads: 4, pretrained: {siglip}}}"
    absent = "backbone={name: hf, pretrained: no/where}"
    for words, said in (
        ([f"backbone.pretrained={llama}"], "hidden_size: found 64; expected 32"),
        ([heads], "heads: found 4; expected 2"),
        ([heads, absent], "heads: found 4; expected 2"),
    ):
        code, error = validated("tiny", *words)
        assert (code, said in error) == (2, True), error
        if absent not in words:
            done = CliRunner().invoke(app, ["info", "tiny", *words])
            assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    code, error = validated("tiny", f"backbone={{name: hf, pretrained: {llama}}}")
    assert code == 0, error


def test_weights_that_are_not_on_this_disk_are_reported_as_not_compared() -> None:
    line = ["config", "validate", "tiny", "backbone={name: hf, pretrained: no/where}"]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0
    assert "  backbone: hf (not compared with no/where, which is not on this disk)\n" in done.stdout


@pytest.mark.parametrize("side", [0, -32])
def test_images_that_are_too_small_to_draw_are_refused(side: int) -> None:
    code, error = validated("tiny", f"generation.height={side}")
    assert code == 2
    assert f"generation.height: {side}; expected at least 1." in error


def test_a_tokenizer_without_a_position_for_the_image_is_refused(plugins: Plugins, monkeypatch) -> None:
    tokenizer = plugins.entry("image_tokenizers", "vq").factory
    monkeypatch.setattr(tokenizer, "grid", lambda self, height, width: (0, 4))
    set_default_plugins(plugins)
    code, error = validated("tiny")
    assert code == 2
    assert "has 0x4 positions for an image of 32x32 pixels; expected at least 1x1" in error


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("model/janus")])
@pytest.mark.slow
def test_no_shipped_model_is_faulted(name: str) -> None:
    assert validated(name)[0] == 0
