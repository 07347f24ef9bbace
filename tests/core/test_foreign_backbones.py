"""Folders of language models from transformers: complete, incomplete and inconsistent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from janus_modular import CheckpointError, ConfigError, JanusError, Message, Text
from janus_modular.janus import Janus

ENCODER = {
    "name": "vit",
    "feature_dim": 32,
    "layers": 1,
    "heads": 2,
    "stem": [8, 16, 32],
    "pixels": {"height": 32, "width": 32},
}
CODES = {"name": "vq", "channels": [8, 8, 16, 16], "num_codes": 32, "code_dim": 4}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NOBODY = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# A family, what its tokenizer has, and the special tokens that end an answer.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "no BOS, no pad, tied": (
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"eos_token": "<|im_end|>", "more": ["<|im_start|>"], "chat_template": CHATML},
        ["<|im_end|>"],
    ),
    "BOS by the template, no pad": (
        {"model_type": "mistral", "tie_word_embeddings": False},
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": MISTRAL},
        ["</s>"],
    ),
    "turns end otherwise than texts": (
        {"model_type": "phi3", "tie_word_embeddings": False},
        {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "more": ["<|assistant|>", "<|user|>", "<|end|>"],
            "chat_template": PHI,
        },
        ["<|endoftext|>", "<|end|>"],
    ),
    "scaled and tied": (
        {"model_type": "gemma3_text", "tie_word_embeddings": True, "head_dim": 16, "sliding_window": 8},
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "more": ["<start_of_turn>", "<end_of_turn>"],
            "chat_template": GEMMA,
        },
        ["<eos>", "<end_of_turn>"],
    ),
    "no chat template": ({"model_type": "llama"}, {"eos_token": "<eos>"}, ["<eos>"]),
    "learned positions": ({"model_type": "gpt2"}, {"eos_token": "<eos>"}, ["<eos>"]),
    "a bias on the logits": ({"model_type": "phi"}, {"eos_token": "<eos>"}, ["<eos>"]),
}


def save_tokenizer(
    folder: Path, *, more: list[str] | None = None, chat_template: str | None = None, **names: str
) -> PreTrainedTokenizerFast:
    """Write a byte-level tokenizer without merges: 256 letters, and the special tokens before them."""
    special = list(dict.fromkeys([*names.values(), *(more or [])]))
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder: Path, vocab_size: int, **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    made = AutoConfig.for_model(**{**NOBODY, **SIZES, "vocab_size": vocab_size, **config})
    model = AutoModelForCausalLM.from_config(made).eval()
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than at the start of a training, so that choices are clear
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model


def composed(folder: Path, template: str = "plain", **backbone: Any) -> Janus:
    return Janus.from_components(
        encoder=ENCODER,
        backbone={"name": "hf", "pretrained": str(folder), **backbone},
        tokenizer=CODES,
        size=32,
        processor={"template": template},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_of_transformers_generates_the_same_as_before(family: str, tmp_path: Path):
    """Prompt, logits and greedy words as transformers has them; then images, and back from disk."""
    config, names, ends = FAMILIES[family]
    folder = tmp_path / "model"
    tokenizer = save_tokenizer(folder, **names)
    model: Any = save_model(folder, len(tokenizer), **config)
    template = "chat" if tokenizer.chat_template else "plain"
    janus = composed(folder, template)
    backbone: Any = janus.model.backbone
    assert backbone.vocab_size == len(tokenizer) + 3
    tables = backbone.model.get_input_embeddings().weight, backbone.model.get_output_embeddings().weight
    assert (tables[0] is tables[1]) == model.config.tie_word_embeddings

    turns = [("user", "what is this"), ("assistant", "a sea"), ("user", "hello")]
    conversation = [Message(role, [Text(words)]) for role, words in turns]
    prompt = janus.processor.chat_prompt(conversation).tokens
    if template == "chat":
        asked = [{"role": role, "content": words} for role, words in turns]
        expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        assert prompt.tolist() == expected["input_ids"]
    ids = torch.from_numpy(prompt)[None]
    with torch.no_grad():
        logits = model(ids).logits
        hidden = backbone(backbone.embed(ids), positions=torch.arange(ids.shape[1])[None])
    torch.testing.assert_close(  # float32 sums in another order, on logits of size 10
        backbone.logits(hidden)[..., : len(tokenizer)], logits, rtol=0, atol=1e-4
    )
    end_ids = tokenizer.convert_tokens_to_ids(ends)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end_ids, "pad_token_id": 0}
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    said = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert janus.chat(conversation, max_tokens=12) == said

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))
    about, drawn = janus.chat("what?", [image], max_tokens=5), janus.draw("a sea", guidance=2.0)
    janus.save_pretrained(tmp_path / "saved")
    again = Janus.from_pretrained(tmp_path / "saved")
    assert again.chat("what?", [image], max_tokens=5) == about
    np.testing.assert_array_equal(again.draw("a sea", guidance=2.0)[0], drawn[0])


def llama(folder: Path, **config: Any) -> Path:
    letters = len(save_tokenizer(folder, eos_token="<eos>"))
    save_model(folder, **{"model_type": "llama", "vocab_size": letters, **config})
    return folder


def test_rows_that_the_vocabulary_has_to_spare_are_used_first(tmp_path: Path):
    janus = composed(llama(tmp_path / "model", vocab_size=320))
    assert janus.model.backbone.vocab_size == 320
    assert janus.processor.suppressed_ids == (257, 258, 259)


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "llava", "smolvlm"])
def test_the_decoder_of_a_larger_model_is_taken_out(family: str, tmp_path: Path):
    tokenizer = save_tokenizer(tmp_path, eos_token="<eos>")
    text = {**NOBODY, **SIZES, "vocab_size": len(tokenizer), "head_dim": 16}
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    more = {"mm_tokens_per_image": 4} if family == "gemma3" else {}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **more)
    whole: Any = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)

    janus = composed(tmp_path)
    backbone: Any = janus.model.backbone
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        hidden = backbone(backbone.embed(ids), positions=torch.arange(20)[None])
        expected = whole(input_ids=ids).logits
    torch.testing.assert_close(backbone.logits(hidden)[..., : len(tokenizer)], expected, rtol=0, atol=1e-5)
    unexpected_keys = janus.assembly.provenance.pretrained[0].unexpected_keys
    assert unexpected_keys
    assert all("vision" in name or "projector" in name or "connector" in name for name in unexpected_keys)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def less_a_layer(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_family(family: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": family}), "utf-8")


def bert(folder: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    BertModel(BertConfig(**sizes, vocab_size=257)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (without("model.safetensors"), CheckpointError, "holds no weights: expected a file ending in"),
        (cut, CheckpointError, "has 5000 bytes, its header promises 129992"),
        (less_a_layer, CheckpointError, r"9 missing:\n *model.layers.1.input_layernorm"),
        (without("config.json"), CheckpointError, "holds no config of a decoder"),
        (of_another_family("janus-modular"), CheckpointError, "holds no config of a decoder"),
        (of_another_family("t5"), ConfigError, "no causal decoder 't5'"),
        (bert, CheckpointError, "missing"),
        (without("tokenizer.json"), ConfigError, "tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_that_is_not_whole_is_an_error_that_says_so(
    spoil: Callable[[Path], None], error: type[JanusError], said: str, tmp_path: Path
):
    folder = llama(tmp_path / "model")
    spoil(folder)
    with pytest.raises(error, match=said):
        composed(folder)


@pytest.mark.parametrize("content", [b"hello" * 50, b"GGUF\x03\0\0\0" + b"\x01" * 50])
def test_a_damaged_gguf_file_is_an_error_that_says_so(content: bytes, tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.gguf holds no config of a decoder"):
        composed(tmp_path / "model.gguf")


def test_a_config_that_the_weights_do_not_fit_is_an_error(tmp_path: Path):
    wider = {**SIZES, "model_type": "llama", "hidden_size": 64, "vocab_size": 257}
    with pytest.raises(ConfigError, match=r"backbone.config.hidden_size: found 64; expected 32, as .*=null"):
        composed(llama(tmp_path / "model"), config=wider)
