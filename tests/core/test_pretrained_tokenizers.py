"""A tokenizer that differs from that of the weights is an error that lists differing tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, SiglipVisionConfig

from janus_modular import ConfigError, Janus
from janus_modular.checkpoints import ModelAssembly
from janus_modular.checkpoints.assembly import tokenizer_files
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.build import ModelBuilder, build_model
from janus_modular.plugins import Plugins
from janus_modular.processing import tokenizer_files as tokenizer_files_module
from janus_modular.training.schema import TrainConfig

ROOT = Path(__file__).parents[2]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def save_tokenizer(folder: Path, special: Sequence[str], *, after: Sequence[str] = ()) -> int:
    """Write a byte-level tokenizer with special tokens before its letters, and some after them."""
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *after]
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*special, *after])
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    return len(letters)


def save_decoder(folder: Path, vocab_size: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab_size, **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model


def composed(folder: Path, tokenizer: str | None) -> Janus:
    return Janus.from_components(
        encoder={"name": "vit", "feature_dim": 16, "layers": 1, "heads": 2, "stem": [8, 16, 16]},
        backbone={"name": "hf", "pretrained": str(folder)},
        tokenizer={"name": "vq", "channels": [8, 8, 16, 16], "num_codes": 16},
        size=16,
        processor={"tokenizer": tokenizer, "template": "plain"},
    )


@pytest.mark.parametrize(
    ("special", "after", "said"),
    [
        (["<pad>", "<eos>"], [], r"has other ids for 257 tokens .*'<eos>' is 1, expected 0.*=null takes"),
        (["<bos>", "<pad>", "<eos>"], [], "has other ids for 257 tokens"),
        (None, [], "has other ids for 256 tokens"),
        (["<eos>"], ["<role>"], None),
    ],
)
def test_a_tokenizer_of_other_weights(
    special: list[str] | None, after: list[str], said: str | None, tmp_path: Path
) -> None:
    own, named = tmp_path / "own", tmp_path / "named"
    save_decoder(own, save_tokenizer(own, ["<eos>"]) + len(after))
    if special is not None:
        save_tokenizer(named, special, after=after)
    tokenizer = "bytes" if special is None else str(named)
    if said is None:
        assert composed(own, tokenizer).processor.tokenizer.id_of("<role>") == 257
        return
    with pytest.raises(ConfigError, match=said):
        composed(own, tokenizer)


def test_more_tokens_than_trained_rows_are_refused(tmp_path: Path) -> None:
    """Weights that bring no tokenizer to compare with."""
    save_decoder(tmp_path / "own", 200)
    save_tokenizer(tmp_path / "named", ["<eos>"])
    with pytest.raises(ConfigError, match="257 tokens of its own, and the backbone's embedding 200 rows"):
        composed(tmp_path / "own", str(tmp_path / "named"))


def stage_one(llm: Path, siglip: Path) -> list[str]:
    """Return the overrides of the first command that the page on stages tells people to type."""
    import shlex

    page = (ROOT / "docs/how-to/train-in-stages.md").read_text("utf-8")
    command = page.split("janus-modular train train/janus_pro/stage1", 1)[1].split("\njanus-modular", 1)[0]
    words = shlex.split(command.replace("\\\n", " "))
    return [word.replace("/models/llm", str(llm)).replace("/models/siglip", str(siglip)) for word in words]


@torch.no_grad()
def test_the_first_stage_starts_from_the_folders_own_models(tmp_path: Path, plugins: Plugins) -> None:
    llm, siglip = tmp_path / "llm", tmp_path / "siglip"
    theirs = save_decoder(llm, save_tokenizer(llm, ["<eos>"]))
    vision = SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40
    )
    vision.save_pretrained(siglip)
    overrides = stage_one(llm, siglip)

    config = resolve(load("train/janus_pro/stage1", overrides, plugins), TrainConfig, plugins).model
    assert config is not None
    config.generation.config.tokenizer.config.channels = 32  # its weights are not looked at here
    model: Any = build_model(config, plugins, on_meta=True)
    assert (model.understanding.encoder.tower.heads, model.understanding.encoder.pixels.resize) == (
        3,
        "letterbox",
    )
    with tokenizer_files(config) as source:
        assert Path(source) == llm
    backbone: Any = ModelBuilder(plugins)(config.backbone).eval()
    ids = torch.arange(5, 14)[None]
    expected = theirs.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
    for _ in range(16):
        hidden = backbone(backbone.embed(ids), positions=torch.arange(ids.shape[1])[None])
        ids = torch.cat([ids, backbone.logits(hidden[:, -1]).argmax(-1, keepdim=True)], 1)
    assert ids.tolist() == expected.tolist()

    beside = [word for word in overrides if word != "model.backbone.config=null"]
    config = resolve(load("train/janus_pro/stage1", beside, plugins), TrainConfig, plugins).model
    assert config is not None
    with pytest.raises(ConfigError, match=r"model.backbone.config=null takes all values from there") as error:
        build_model(config, plugins, on_meta=True)
    assert "model.backbone.config.rope_parameters.rope_theta: found 10000.0; expected 500.0" in str(
        error.value
    )
    assert json.loads((llm / "config.json").read_text())["hidden_size"] == 32


PIECES = b"\n\x07\n\x05<unk>" + b"\n\xcb\x01\n\xc8\x01" + b"a" * 200 + b"\x12\x00"
"""Two pieces, and an empty trainer_spec, as sentencepiece's protocol buffer has them."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"garbage", r"tokenizer.model \(7 bytes\) is neither .* damaged: fetch it again"),
        (b"", r"tokenizer.model \(0 bytes\) is neither"),
        (
            PIECES[:-3],
            "neither a sentencepiece nor a tiktoken vocabulary, or it is damaged",
        ),
        (PIECES, "needs the package 'sentencepiece', .*pip install sentencepiece"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
    ],
)
def test_a_damaged_vocabulary_is_an_error_with_its_reason(
    content: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers says of each that tiktoken is not installed."""
    save_decoder(tmp_path, 300)
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr(tokenizer_files_module, "find_spec", lambda name: None)
    words = [f"backbone={{name: hf, pretrained: {tmp_path}}}", "processor.tokenizer=null"]
    config = resolve(load("tiny", words), ModelConfig)
    with pytest.raises(ConfigError, match=said), tokenizer_files(config):
        pass


def test_a_damaged_vocabulary_is_an_error_of_the_tokenizer(tmp_path: Path) -> None:
    """The library in Rust raises a plain Exception over it."""
    (tmp_path / "vocab.json").write_text('{"a": 1')
    (tmp_path / "merges.txt").write_text("x")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    config = resolve(load("model/tiny", [f"processor.tokenizer={tmp_path}"]), ModelConfig)
    with pytest.raises(ConfigError, match="could not make one of it"):
        ModelAssembly.from_config(config)
