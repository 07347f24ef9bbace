"""Tokenizers from files: special tokens by string, added tokens, errors, and saving."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from janus_modular.config.schema import ProcessorConfig, SpecialTokens
from janus_modular.errors import ConfigError, PromptError
from janus_modular.interfaces import PixelSpec
from janus_modular.processing.processor import Drawing, Processor
from janus_modular.processing.text_tokenizer import TextSpan
from janus_modular.processing.tokenizer_files import load_tokenizer, save_tokenizer
from janus_modular.sequence import Message, Sample, Text


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    """Copy the reference tokenizer's files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(reference / name, tmp_path / name)
    return tmp_path


def change(file: Path, **changes: object) -> None:
    parsed = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in parsed.items() if v is not None}), "utf-8")


def without(folder: Path, string: str) -> None:
    """Take a special token out of a vocabulary."""
    parsed = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["content"] != string]
    vocabulary = parsed["model"]["vocab"]
    if string in vocabulary:
        vocabulary[f"unused {string[1:-1]}"] = vocabulary.pop(string)
    (folder / "tokenizer.json").write_text(json.dumps(parsed), "utf-8")


def test_ids_by_string(reference: Path) -> None:
    tokenizer = load_tokenizer(reference, published=True)
    names = ("bos", "eos", "pad", "begin_image", "end_image", "placeholder")
    assert [tokenizer.special_id(name) for name in names] == [1, 2, 3, 4, 5, 6]
    assert tokenizer.id_of("<|User|>") == 7
    assert tokenizer.vocab_size == 1024
    assert tokenizer.added == ()
    with pytest.raises(KeyError):
        tokenizer.id_of("<nothing>")


def test_a_single_file(reference: Path) -> None:
    tokenizer = load_tokenizer(reference / "tokenizer.json", published=True)
    assert (tokenizer.special_id("eos"), tokenizer.special_id("pad"), tokenizer.adds_bos) == (2, 3, True)
    with pytest.raises(ConfigError, match=r"processor\.tokens\.eos"):
        load_tokenizer(reference / "tokenizer.json")
    named = SpecialTokens(eos="<|Assistant|>")
    tokenizer = load_tokenizer(reference / "tokenizer.json", named)
    assert [tokenizer.special_id(name) for name in ("bos", "eos", "pad")] == [None, 8, 8]
    assert not tokenizer.adds_bos


def test_a_missing_placeholder_is_added(copy: Path) -> None:
    without(copy, "<image_placeholder>")
    tokenizer = load_tokenizer(copy, published=True)
    assert tokenizer.added == ("<image_placeholder>",)
    assert tokenizer.special_id("placeholder") == tokenizer.vocab_size - 1 == 1024


@pytest.mark.parametrize(
    "string", ["<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>", "<｜end▁of▁sentence｜>"]
)
def test_missing_special_tokens_are_errors(copy: Path, string: str) -> None:
    without(copy, string)
    with pytest.raises(ConfigError, match=rf"lacks '{string}'"):
        load_tokenizer(copy, published=True)


def test_missing_role_token_is_an_error(copy: Path) -> None:
    without(copy, "<|User|>")
    config = ProcessorConfig(tokenizer=str(copy), template="janus-pro")
    with pytest.raises(ConfigError, match=r"'janus-pro' needs <\|User\|>"):
        Processor.build(config, pixels=PixelSpec(), image_tokens=4, drawing=None)


def test_missing_image_tokens_are_added(copy: Path) -> None:
    for string in ("<begin_of_image>", "<end_of_image>", "<image_placeholder>", "<｜▁pad▁｜>"):
        without(copy, string)
    change(copy / "special_tokens_map.json", pad_token=None, bos_token=None)
    change(
        copy / "tokenizer_config.json",
        pad_token=None,
        bos_token=None,
        eos_token={"content": "<｜end▁of▁sentence｜>"},
    )
    tokenizer = load_tokenizer(copy)
    assert tokenizer.added == ("<begin_of_image>", "<end_of_image>", "<image_placeholder>")
    assert (tokenizer.special_id("bos"), tokenizer.special_id("eos"), tokenizer.special_id("pad")) == (
        None,
        2,
        2,
    )
    assert tokenizer.vocab_size == 1027


@pytest.mark.parametrize("source", ["reference", "bytes"])
def test_saved_tokenizer_loads(source: str, reference: Path, tmp_path: Path) -> None:
    first = load_tokenizer(reference if source == "reference" else source, published=True)
    first.chat_template = "{{ messages }}"
    save_tokenizer(first, tmp_path)
    again = load_tokenizer(tmp_path, published=True)
    assert (again.names, again.added, again.adds_bos, again.chat_template, again.vocab_size) == (
        first.names,
        (),
        first.adds_bos,
        first.chat_template,
        first.vocab_size,
    )
    spans = [TextSpan("<begin_of_image>", True), TextSpan("Héllo <eos> 你\n")]
    assert again.encode(spans).ids.tolist() == first.encode(spans).ids.tolist()
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs("Hello 你").input_ids[-3:] == first.encode([TextSpan("Hello 你")]).ids[-3:].tolist()
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == tuple(
        first.names[n] for n in ("bos", "eos", "pad")
    )


def test_a_processor_is_rebuilt_from_its_folder(make: Callable[..., Processor], tmp_path: Path) -> None:
    for template, source in (("janus-pro", None), ("plain", "bytes")):
        first = make(template, **({"source": source} if source else {}), context=99, system="S")
        first.save(tmp_path / template)
        again = Processor.load(tmp_path / template)
        assert again.to_dict() == first.to_dict() == json.loads(json.dumps(first.to_dict()))
        assert again.pixels == first.pixels
        assert again.drawing == Drawing(8, 8, 3)
        sample = Sample([Message("user", [Text("a")]), Message("assistant", [Text("b")])])
        assert again.sequence(sample).tokens.tolist() == first.sequence(sample).tokens.tolist()
    with pytest.raises(ConfigError, match=r"no processor\.json"):
        Processor.load(tmp_path)


def test_added_tokens_are_saved(copy: Path, tmp_path: Path) -> None:
    without(copy, "<image_placeholder>")
    config = ProcessorConfig(tokenizer=str(copy), template="janus")
    first = Processor.build(config, pixels=PixelSpec(), image_tokens=4, drawing=None)
    first.save(tmp_path / "saved")
    again = Processor.load(tmp_path / "saved")
    assert again.tokenizer.added == ()
    assert again.suppress_tokens == first.suppress_tokens == ("<image_placeholder>",)
    assert again.suppressed_ids == (1024,)


def test_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found: an empty folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="found: nothing"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"processor\.tokenizer is not set"):
        Processor.build(ProcessorConfig(), pixels=PixelSpec(), image_tokens=4, drawing=None)


def test_damaged_configuration_is_an_error(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json cannot be read as JSON"):
        load_tokenizer(copy)


def test_byte_tokenizer_ids_are_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    text = bytes(range(128)).decode() + "é你🦊<eos>"
    ids = tokenizer.encode([TextSpan(text)]).ids.tolist()
    assert bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 256 + 8
    assert tokenizer.added == ()


def test_text_with_surrogates_is_an_error() -> None:
    tokenizer = load_tokenizer("bytes")
    with pytest.raises(PromptError, match=r"'\\udcff', which is no character"):
        tokenizer.encode([TextSpan("a" + b"\xff".decode(errors="surrogateescape"))])


BACKTRACKING = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}
LONG = "a" * 40 + "!"


FUSED = {"type": "Sequence", "decoders": [{"type": "Fuse"}, BACKTRACKING]}


@pytest.mark.parametrize("change_of", [{"normalizer": BACKTRACKING}, {"decoder": FUSED}])
def test_a_tokenizer_that_fails_on_a_text_is_an_error(copy: Path, change_of: dict[str, object]) -> None:
    """The library in Rust panics there, which is no Exception in Python."""
    change(copy / "tokenizer.json", **change_of)
    tokenizer = load_tokenizer(copy, published=True)
    with pytest.raises(PromptError, match=r"(?s)cannot be read: PanicException.*tokenizer\.json"):
        tokenizer.decode(tokenizer.encode([TextSpan(LONG)]).ids)
