"""Configs, records, tokenizers, images after any edit: they are read, or refused by name; no traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from janus_modular.checkpoints import ModelAssembly
from janus_modular.checkpoints.native import save
from janus_modular.checkpoints.opening import open_lazily
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, JanusError
from janus_modular.processing.processor import Processor
from janus_modular.processing.tokenizer_files import load_tokenizer
from janus_modular.training.schema import TrainConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights; tests edit copies of its files."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    save(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)), folder)
    return folder


@pytest.fixture(scope="module")
def edited(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second folder of the same files, which a test may overwrite."""
    folder = tmp_path_factory.mktemp("hostile") / "edited"
    shutil.copytree(checkpoint, folder)
    return folder


def edit(checkpoint: Path, folder: Path, name: str, content: Any) -> None:
    """Make ``folder`` the checkpoint with another content, JSON or bytes, of one file."""
    for file in checkpoint.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder / file.name)
    raw = content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(raw)


def set_at(tree: Any, path: str, value: Any) -> Any:
    """Return ``tree`` with the value at a dotted path replaced, in place."""
    here = tree
    *way, last = path.split(".")
    for key in way:
        here = here[key]
    here[last] = value
    return tree


# Records of checkpoints


@given(data=st.data())
def test_an_edited_record_is_read_or_refused_by_name(
    checkpoint: Path, edited: Path, mutations: ModuleType, data: st.DataObject
) -> None:
    whole = json.loads((checkpoint / "config.json").read_text())
    edit(checkpoint, edited, "config.json", data.draw(mutations.damaged_json(whole)))
    mutations.read_or_refused(lambda: open_lazily(edited), JanusError, str(edited))


@given(data=st.data())
def test_an_edited_processor_is_read_or_refused_by_name(
    checkpoint: Path, edited: Path, mutations: ModuleType, data: st.DataObject
) -> None:
    whole = json.loads((checkpoint / "processor.json").read_text())
    edit(checkpoint, edited, "processor.json", data.draw(mutations.damaged_json(whole)))
    mutations.read_or_refused(lambda: Processor.load(edited), JanusError, "processor.json")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("model.backbone.config.num_hidden_layers", 10**18, "num_hidden_layers: found a number of 60 bits"),
        ("model.backbone.config.num_hidden_layers", 9_000, "at most 1,000"),
        ("model.understanding.encoder.layers", 5_000, "at most 1,000"),
        ("model.understanding.encoder.layers", 2**64, r"encoder\.layers: .*more than 64 bits"),
        ("model.backbone.config.hidden_size", 2**62, "hidden_size: found a number of 63 bits"),
        ("model.backbone.config.vocab_size", 10**11, "largest numbers: .*vocab_size 100,000,000,000"),
        ("model.backbone.name", ["hf"], r"backbone: found \{'name': \['hf'\]"),
        ("model.text_sampler", "${", "text_sampler"),
        ("format", "1", "format is a str, expected a int"),
        ("format", -1, "format is -1, expected 1 or more"),
        ("training", [1], "training is a list, expected a dict"),
        ("training", "x", "training is a str"),
        ("training", None, "training is a NoneType"),
        ("model.text_sampler", "te\0xt", "text_sampler: .*NUL"),
        ("plugins", [3], "plugins has 3"),
        ("pretrained", [1], "cannot be read"),
        ("model", "tiny", "model is a str"),
    ],
)
def test_refuses_records_of_other_types_and_sizes(
    path: str, value: Any, said: str, checkpoint: Path, edited: Path
) -> None:
    whole = json.loads((checkpoint / "config.json").read_text())
    edit(checkpoint, edited, "config.json", set_at(whole, path, value))
    with pytest.raises(JanusError, match=rf"(?s){edited}.*{said}"):
        open_lazily(edited)


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("config.json", "model_type"),
        ("processor.json", "template"),
        ("processor.json", "tokens.bos"),
        ("config.json", "model.generation.tokenizer.name"),
    ],
)
def test_messages_do_not_repeat_endless_words(file: str, path: str, checkpoint: Path, edited: Path) -> None:
    whole = json.loads((checkpoint / file).read_text())
    edit(checkpoint, edited, file, set_at(whole, path, "x" * 50_000))
    with pytest.raises(JanusError, match=r"x{200}\.\.\.") as caught:
        open_lazily(edited)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    "content", [b"[]", b'{"a":' * 3000 + b"1" + b"}" * 3000, b"\xff\xfe", b"", b"[" * 200_000, b"1" * 10_000]
)
@pytest.mark.parametrize("name", ["config.json", "processor.json", "tokenizer.json", "tokenizer_config.json"])
def test_refuses_files_that_are_no_records(name: str, content: bytes, checkpoint: Path, edited: Path) -> None:
    edit(checkpoint, edited, name, content)
    with pytest.raises(JanusError, match=name):
        open_lazily(edited)


@pytest.mark.parametrize("name", ["config.json", "processor.json", "tokenizer.json"])
def test_refuses_devices_and_pipes_unread(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    (folder / name).unlink()
    os.symlink("/dev/zero", folder / name)
    with pytest.raises(JanusError, match=name):
        open_lazily(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(JanusError, match=name):
        open_lazily(folder)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("image_tokens", 10**18, "image_tokens: found 1,000,000,000,000,000,000; expected from 1"),
        ("image_tokens", -1, "image_tokens: found -1"),
        ("context", "many", "context: found 'many'; expected a whole number"),
        ("pixels.height", 10**9, "pixels: found"),
        ("pixels.mean", ["a", 1, 1], "mean: found"),
        ("suppress_tokens", 5, "suppress_tokens: found 5; expected a list"),
        ("drawing", [], r"found \[\]; expected the keys height, width, num_tokens"),
        ("tokens.pad", [1], "pad: found"),
        ("template", None, "template: found None"),
    ],
)
def test_refuses_processors_of_other_types_and_sizes(
    path: str, value: Any, said: str, checkpoint: Path, edited: Path
) -> None:
    whole = json.loads((checkpoint / "processor.json").read_text())
    edit(checkpoint, edited, "processor.json", set_at(whole, path, value))
    with pytest.raises(ConfigError, match=rf"processor\.json: {said}"):
        Processor.load(edited)


# Tokenizers


@given(data=st.data())
def test_an_edited_tokenizer_is_read_or_refused_by_name(
    checkpoint: Path, edited: Path, mutations: ModuleType, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]))
    whole = json.loads((checkpoint / name).read_text())
    edit(checkpoint, edited, name, data.draw(mutations.damaged_json(whole)))
    read = mutations.read_or_refused(lambda: load_tokenizer(edited), JanusError, str(edited))
    if read is not None:
        assert read.vocab_size < 300_000
        mutations.read_or_refused(
            lambda: read.encode(read.split_at_special_tokens("hello")), JanusError, "tokenizer"
        )


@pytest.mark.parametrize(
    ("vocabulary", "added", "said"),
    [
        ({"zz": 2**31}, {}, "ids up to 2,147,483,648"),
        ({"zz": 2**32 - 1}, {}, "ids up to 4,294,967,295"),
        ({"zz": 1_000_000}, {}, "ids up to 1,000,000"),
        ({"zz": 5}, {}, "gives the id 5 to"),
        ({}, {"id": 2**31}, "the id 2147483648, which would become 263"),
        ({}, {"id": 7}, "the id 7, which would become 263"),
        ({}, {"id": 300}, "the id 300, which would become 263"),
        ({}, {"id": -1}, "cannot be read"),
        ({}, {"content": 5}, "cannot be read"),
    ],
)
def test_refuses_ids_that_are_not_a_vocabularys(
    vocabulary: dict[str, int], added: dict[str, Any], said: str, checkpoint: Path, edited: Path
) -> None:
    whole = json.loads((checkpoint / "tokenizer.json").read_text())
    whole["model"]["vocab"] |= vocabulary
    whole["added_tokens"][-1] |= added
    edit(checkpoint, edited, "tokenizer.json", whole)
    with pytest.raises(ConfigError, match=rf"tokenizer\.json .*{said}"):
        load_tokenizer(edited)


LONG = {"type": "Replace", "pattern": {"String": "h"}, "content": "h" * 1000}
BEGIN = {"type": "Prepend", "prepend": "h" * 900}


def in_turn(*rules: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(rules)}


@pytest.mark.parametrize(
    ("part", "rules"),
    [
        ("normalizer", in_turn(LONG, LONG)),
        (
            "normalizer",
            in_turn(in_turn(LONG, LONG), LONG),
        ),
        (
            "normalizer",
            in_turn(BEGIN, LONG),
        ),
        ("normalizer", {**LONG, "content": "h" * 2000}),
        ("decoder", {"type": "Sequence", "decoders": [LONG] * 3}),
    ],
)
def test_refuses_rules_that_make_gigabytes_of_a_letter(
    part: str, rules: Any, checkpoint: Path, edited: Path
) -> None:
    whole = json.loads((checkpoint / "tokenizer.json").read_text())
    edit(checkpoint, edited, "tokenizer.json", {**whole, part: rules})
    with pytest.raises(ConfigError, match=rf"tokenizer\.json: its {part} may replace .*at most 1,000"):
        load_tokenizer(edited)


# Configs

SMALL = {
    "model": "tiny",
    "learn": ["generation.head", "backbone"],
    "sources": {"text": {"name": "jsonl", "path": "a.jsonl"}, "draw": {"name": "jsonl", "path": "b.jsonl"}},
    "mixture": [{"until": 5, "text": 1, "draw": 2}, {"text": 1.5}],
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "schedule": {"steps": 20, "name": "cosine"},
    "batch": 4,
    "length": 128,
    "seed": 3,
}


@given(data=st.data())
def test_an_edited_config_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, mutations: ModuleType, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "stage.yaml"
    path.write_text(yaml.safe_dump(data.draw(mutations.damaged_json(SMALL))))
    mutations.read_or_refused(lambda: resolve(load(path), TrainConfig), ConfigError, "")


@given(data=st.data())
def test_any_override_is_taken_or_refused(mutations: ModuleType, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(["length", "learn", "mixture.0.text", "sources", "model", "a.b"]))
    value = data.draw(
        st.one_of(st.text(max_size=20), st.sampled_from(["[" * 2000, "${", "'", "\0", "&a [*a]"]))
    )
    if key == "model":
        value = f"nowhere/{value}"
    mutations.read_or_refused(lambda: resolve(load(SMALL, [f"{key}={value}"]), TrainConfig), ConfigError, "")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('length="${"', "not YAML"),
        ("length=${length}", "length"),
        ("learn=[{a: 1}]", r"learn: found \[\{'a': 1\}\]"),
        ("mixture.text=.nan", "found nan; expected a share from 0"),
        ("mixture.text=.inf", "found inf; expected a share from 0"),
        ("mixture={text: 1e300, draw: 1}", "expected a share from 0"),
        (f"seed={10**40}", "seed: found .*: the number takes more than 64 bits"),
        ("condition_dropout=.nan", "nan is not a finite number"),
        (f"learn={'[' * 3000}", "not YAML"),
        ('output="a\\0b"', "output: found 'a.x00b'; expected text: the text holds the character NUL"),
        ('sources.text.path="\\0"', "sources.text.path: .*NUL"),
        ('learn=["backbone\\0"]', "learn: .*NUL"),
        ('model.text_sampler="te\\0xt"', "text_sampler: .*NUL"),
        ("output=''", "output: found ''; expected the name of a folder"),
        ("batch=100000000000", "batch: 100,000,000,000; expected at most"),
        ("accumulate=100000000000", "accumulate: .* at most"),
        ("workers=100000000", "workers: .* at most"),
        ("mixture=[{until: true, text: 1, draw: 1}, {text: 1, draw: 1}]", "phase 1 has until True"),
        ("model=/dev/zero", "there is no config '/dev/zero'"),
        (f"model={'x' * 5000}", "cannot be read"),
    ],
)
def test_refuses_overrides_that_nothing_can_be_trained_with(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(load({**SMALL, "mixture": {"text": 1, "draw": 1}}, [override]), TrainConfig)


def test_says_nothing_of_values_that_could_not_be_read() -> None:
    overrides = ["length=${batch}", "batch=${length}"]
    with pytest.raises(ConfigError) as error:
        resolve(load(SMALL, overrides), TrainConfig)
    assert [fault.path for fault in error.value.errors] == ["batch", "length"]


@pytest.mark.parametrize("content", ["[" * 5000, "a: &a [*a]", "\0", "a: !!python/object:os.system x", "- 1"])
def test_refuses_files_that_are_no_configs(content: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"odd\.yaml"):
        load(path)


def test_refuses_aliases_that_multiply(tmp_path: Path) -> None:
    path = tmp_path / "laughs.yaml"
    rows = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path.write_text("\n".join(["a0: &a0 [x, x]", *rows]))
    with pytest.raises(ConfigError, match=r"laughs\.yaml has [0-9,]+ values once its aliases"):
        load(path)


@pytest.mark.parametrize("value", [[1.0] * 20_000, {str(i): i for i in range(20_000)}, [[0] * 200] * 200])
def test_refuses_a_checkpoint_whose_config_takes_minutes_to_read(
    value: Any, checkpoint: Path, edited: Path
) -> None:
    record = json.loads((checkpoint / "config.json").read_text())
    set_at(record, "model.backbone.config.rope_parameters", value)
    edit(checkpoint, edited, "config.json", record)
    with pytest.raises(JanusError, match="more than 10,000 values"):
        open_lazily(edited)


def test_builds_no_model_that_is_larger_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus_modular.model.build._physical_memory", lambda: 100_000.0)
    with pytest.raises(ConfigError, match=r"its weights take more than 0\.0 GB, and this machine has"):
        ModelAssembly.from_config(resolve(load("tiny"), ModelConfig))
