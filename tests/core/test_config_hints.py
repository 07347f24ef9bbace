"""What errors of configs and settings suggest: where a file is, and which key is missing or misspelt."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_modular import samplers
from janus_modular.config import load, resolve, to_yaml
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, PromptError
from janus_modular.plugins import default_plugins
from janus_modular.training.schema import TrainConfig


def test_a_config_beside_the_file_that_names_it_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/mine.yaml").write_text(to_yaml(load("tiny")), "utf-8")
    (tmp_path / "inner/run.yaml").write_text("model: mine.yaml", "utf-8")
    with pytest.raises(ConfigError, match=r"from the working directory.* Write 'inner/mine.yaml'"):
        load("inner/run.yaml")
    assert load("inner/run.yaml", ["model=inner/mine.yaml"])["model"] == load("tiny")


def test_a_component_without_a_name_and_a_misspelt_name():
    tree = load("tiny")
    del tree["generation"]["name"]
    tree["backbone"]["names"] = "hf"
    with pytest.raises(ConfigError) as caught:
        resolve(tree, ModelConfig)
    unnamed, misspelt = caught.value.errors
    assert (unnamed.path, unnamed.problem) == (
        "generation",
        "found options without a name: height, width, tokenizer, adaptor, head",
    )
    assert unnamed.hint.startswith("Add `name`. Registered: autoregressive")
    assert (misspelt.path, misspelt.hint) == ("backbone.names", "Did you mean 'name'?")
    assert misspelt.expected.startswith("one of name, pretrained, revision, config")


def test_options_of_a_source_that_the_config_does_not_have_name_those_that_it_has():
    tree = load("train/janus/stage1", ["sources.read.path=mine.jsonl"])
    with pytest.raises(ConfigError) as caught:
        resolve(tree, TrainConfig)
    error = caught.value.errors[0]
    assert (error.path, error.problem) == ("sources.read", "found options without a name: path")
    expected = f"Add `name` if none of {', '.join(load('train/janus/stage1')['sources'])} was meant. "
    assert error.hint.startswith(expected)


def test_a_config_of_another_type_is_named_with_its_article():
    with pytest.raises(ConfigError, match=r"^this is an export config; expected a model config\."):
        resolve(load("export/gpu"), ModelConfig)


def test_a_misspelt_setting_of_a_sampler():
    with pytest.raises(PromptError, match=r"^guidence: no such setting .* Did you mean 'guidance'\?$"):
        samplers.with_settings(default_plugins(), "image_samplers", "autoregressive", {"guidence": 2})
