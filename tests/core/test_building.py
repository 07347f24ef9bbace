"""Components with nested components get their builder; options that no config can set are errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from janus_modular import ConfigError, PluginError
from janus_modular.bundles import open_bundle
from janus_modular.checkpoints.opening import build_format
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.plugins import Plugins, set_default_plugins
from janus_modular.training.run_setup import open_sources
from janus_modular.training.schema import TrainConfig
from janus_modular.training.train import train

HOLDERS = '''
"""A component in every slot around the model that holds others."""
from dataclasses import dataclass, field
import numpy as np
from janus_modular import ComponentSpec, ComponentConfig, hookimpl, component
from janus_modular import Message, Sample, Text

@dataclass
class TokensConfig(ComponentConfig):
    """The codes of a tokenizer, as text."""
    tokenizer: ComponentSpec = component("image_tokenizers")
    text: str = "codes"  # what they are called
    model: str = "none"  # an option of a name that means another config at the top
    extra: dict[str, str] = field(default_factory=dict)

class Tokens:
    def __init__(self, config, build):
        import torch
        self.config, self.tokenizer = config, build(config.tokenizer)
        self.codes = self.tokenizer.encode(torch.zeros(1, 3, 16, 16))[0].tolist()
    def __len__(self):
        return 4
    def sample(self, index, rng):
        text = Text(f"{self.config.text} {self.codes}", True)
        return Sample([Message("assistant", [text])], template=False)

@dataclass
class LogConfig(ComponentConfig):
    """A tracker around others."""
    inner: list[ComponentSpec] = component("trackers")

class Log:
    def __init__(self, config, folder, build):
        self.inner = [build(one, folder) for one in config.inner]
    def log(self, step, values):
        for one in self.inner:
            one.log(step, values)
    def close(self):
        for one in self.inner:
            one.close()

@dataclass
class DraftConfig(ComponentConfig):
    """A runtime beside another."""
    variant: str | None = None
    device: str = "auto"
    draft: ComponentSpec | None = component("runtimes")

class Draft:
    text_sampler, image_sampler, context = "text", "autoregressive", 8
    def __init__(self, config, folder, build):
        self.draft = config.draft and build(config.draft, folder)

@dataclass
class WrapConfig(ComponentConfig):
    """A format around others."""
    inner: list[ComponentSpec] = component("formats")

class Wrap:
    model_type = "wrap"
    def __init__(self, config, build):
        self.inner, self.build = config.inner, build

@hookimpl
def register_sources(registry):
    registry.add("tokens", Tokens, TokensConfig)

@hookimpl
def register_trackers(registry):
    registry.add("log", Log, LogConfig)

@hookimpl
def register_runtimes(registry):
    registry.add("draft", Draft, DraftConfig)

@hookimpl
def register_formats(registry):
    registry.add("wrap", Wrap, WrapConfig)
'''
TOKENIZER = {"name": "vq", "channels": [4, 4], "blocks": 1, "num_codes": 8, "code_dim": 4}


@pytest.fixture
def holders(tmp_path: Path, plugins: Plugins) -> Plugins:
    (tmp_path / "holders.py").write_text(HOLDERS)
    plugins.add_file(tmp_path / "holders.py")
    set_default_plugins(plugins)
    return plugins


def stage(plugins: Plugins, output: Path, *changes: str) -> TrainConfig:
    raw = {
        "model": "tiny",
        "learn": ["understanding.adaptor", "backbone"],
        "sources": {"codes": {"name": "tokens", "tokenizer": TOKENIZER}},
        "mixture": {"codes": 1},
        "batch": 1,
        "length": 256,
        "schedule": {"steps": 1},
        "log_every": 1,
        "output": str(output),
        "trackers": [
            {
                "name": "log",
                "inner": ["jsonl", {"name": "log", "inner": [{"name": "jsonl", "file": "b.jsonl"}]}],
            }
        ],
    }
    return resolve(load(raw, changes, plugins), TrainConfig, plugins)


def test_train_builds_sources_and_trackers_that_hold_components(holders: Plugins, tmp_path: Path) -> None:
    folder = train(stage(holders, tmp_path / "run"), quiet=True, plugins=holders)
    for file in ("metrics.jsonl", "b.jsonl"):
        [line] = (folder.parent / file).read_text().splitlines()
        assert json.loads(line)["step"] == 1


def test_a_runtime_and_a_format_that_hold_components(holders: Plugins, tiny_bundle_folder: Path) -> None:
    chosen: dict[str, Any] = {"name": "draft", "draft": {"name": "draft"}}
    runtime, _, _ = open_bundle(tiny_bundle_folder, runtime=chosen, plugins=holders)
    assert type(runtime.draft).__name__ == "Draft"
    assert runtime.draft.draft is None
    assert callable(build_format("wrap", holders).build)


@pytest.fixture
def tiny_bundle_folder(tmp_path: Path) -> Path:
    """A folder that a runtime of the plugin takes for a bundle."""
    from janus_modular.checkpoints import ModelAssembly
    from janus_modular.config.schema import ModelConfig

    folder = tmp_path / "bundle"
    folder.mkdir()
    ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)).processor.save(folder)
    (folder / "manifest.json").write_text("{}")
    return folder


def test_a_source_that_cannot_be_built_is_named_by_its_path(holders: Plugins, tmp_path: Path) -> None:
    config = stage(holders, tmp_path, "sources.codes.tokenizer.code_dim=3", "sources.codes.text=caption")
    config.sources["codes"].config.tokenizer.config.blocks = None
    with pytest.raises(ConfigError, match=r"sources\.codes\.tokenizer: the image tokenizer 'vq'.*TypeError"):
        open_sources(config, holders)


@pytest.mark.parametrize("name", ["tokens", "sources:tokens"])
def test_check_takes_what_train_takes(holders: Plugins, tmp_path: Path, name: str) -> None:
    options = [f"tokenizer={json.dumps(TOKENIZER)}", "model=tiny", "text=vq"]
    done = CliRunner().invoke(app, ["plugins", "check", name, *options])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["model=tiny"], {"model": "tiny"}),
        (["text=vq", "model=jsonl"], {"text": "vq", "model": "jsonl"}),  # both are names of components
        (["extra.name=vq", "extra.kind=a"], {"extra": {"name": "vq", "kind": "a"}}),
        (["extra.kind=b", "extra={name: vq, kind: a}"], {"extra": {"name": "vq", "kind": "b"}}),
    ],
)
def test_options_whose_texts_name_components_are_overridden(
    holders: Plugins, tmp_path: Path, changes: list[str], wanted: dict[str, Any]
) -> None:
    options = [f"sources.codes.{change}" for change in ("model=vit", "text=ibq", *changes)]
    config = stage(holders, tmp_path, *options).sources["codes"].config
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(("before", "after"), [("text", "autoregressive"), ("autoregressive", "text")])
def test_a_loop_is_overridden_by_its_name(plugins: Plugins, before: str, after: str) -> None:
    raw = load({**load("tiny"), "text_sampler": before}, [f"text_sampler={after}"], plugins)
    assert raw["text_sampler"] == after
    raw = load({"model": "tiny"}, [f"model.text_sampler={before}", f"model.text_sampler={after}"], plugins)
    assert raw["model"]["text_sampler"] == after


def test_overrides_of_a_part_and_of_the_whole_both_count_in_any_order(plugins: Plugins) -> None:
    changes = ["understanding.encoder.feature_dim=24", "understanding.encoder={name: vit, layers: 1}"]
    for words in (changes, changes[::-1]):
        assert load("tiny", words, plugins)["understanding"]["encoder"] == {
            "name": "vit", "layers": 1, "feature_dim": 24,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("slot", "base", "field", "said"),
    [
        ("sources", "ComponentConfig", "name: str = ''", "has a field 'name', but in a config file"),
        ("text_samplers", "", "name: str = ''", "has a field 'name'"),
        ("adaptors", "", "size: int = 1", "lacks 'pretrained' and 'revision'"),
        ("text_samplers", "", "size: int = 1", "lack max_tokens and numbers"),
        ("image_samplers", "", "size: int = 1", "Derive them from janus_modular.ImageSamplerSettings"),
        (
            "text_samplers",
            "TextSamplerSettings",
            "guide: ComponentSpec = component('backbones')",
            "settings hold a component",
        ),
    ],
)
def test_options_that_cannot_be_set_are_errors_at_registration(
    tmp_path: Path, slot: str, base: str, field: str, said: str
) -> None:
    (tmp_path / "odd.py").write_text(
        "from dataclasses import dataclass\n"
        "from janus_modular import ComponentConfig, ComponentSpec, TextSamplerSettings, component, hookimpl\n"
        f"@dataclass\nclass OddConfig({base}):\n    {field}\n"
        f"@hookimpl\ndef register_{slot}(registry):\n    registry.add('odd', object, OddConfig)\n"
    )
    with pytest.raises(PluginError, match=re.escape(said)):
        Plugins().add_file(tmp_path / "odd.py")


@pytest.mark.parametrize(
    "path", ["sources.codes.pretrained", "trackers.0.pretrained", "sources.codes.revision"]
)
def test_weights_are_refused_where_nothing_would_load_them(
    holders: Plugins, tmp_path: Path, path: str
) -> None:
    with pytest.raises(ConfigError, match="has no weights to load"):
        stage(holders, tmp_path, f"{path}=weights.safetensors")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "text_sampler=txet"], "text_sampler: no text sampler is called 'txet'"),
        (["tiny", "text_sampler=vit"], "text_sampler: no text sampler is called 'vit'"),
        (
            ["tiny", "understanding.encoder.name=dinov2"],
            "'dinov2'. hf-vision builds it: {name: hf-vision, config: {model_type: dinov2}}",
        ),
        (["tiny", "understanding.encoder.width=64"], "It is called 'feature_dim' now."),
        (["tiny", "backbone.name=qwen3"], "hf builds it: {name: hf, config: {model_type: qwen3}}"),
        (["CONFIG", "length=4096"], "length: rows of 4096 positions; the backbone's context is 512"),
        (["CONFIG", "model.text_sampler=txet"], "model.text_sampler: no text sampler"),
        (["CONFIG", "sources.codes.revision=main"], "sources.codes.revision: found 'main'"),
        (["CONFIG"], None),
        (["tiny", "text_sampler=autoregressive", "text_sampler=text"], None),
    ],
)
def test_what_validate_accepts_can_be_trained_and_used(
    holders: Plugins, tmp_path: Path, words: list[str], said: str | None
) -> None:
    raw = {
        "model": "tiny", "learn": ["backbone"], "mixture": {"codes": 1}, "batch": 1, "length": 256,
        "sources": {"codes": {"name": "tokens", "tokenizer": TOKENIZER}}, "schedule": {"steps": 1},
    }  # fmt: skip
    (tmp_path / "stage.yaml").write_text(json.dumps(raw))
    line = [str(tmp_path / "stage.yaml") if word == "CONFIG" else word for word in words]
    done = CliRunner().invoke(app, ["config", "validate", *line])
    assert done.exit_code == (0 if said is None else 2), done.output
    assert said is None or said in " ".join(done.output.split())
