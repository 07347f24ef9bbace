"""Config files, overrides, and the report of all errors of a config."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import component_specs, load, resolve, shipped, to_plain, to_yaml
from janus_modular.config.config_types import schema_of
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, PromptError
from janus_modular.interfaces import ComponentSpec, component
from janus_modular.janus import Janus
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.training.schema import TrainConfig

PLUGIN = """
from dataclasses import dataclass
from janus_modular import ComponentSpec, ComponentConfig, hookimpl, component

@dataclass
class SmallConfig(ComponentConfig):
    '''Options.'''
    width: int = 4  # wide
    depth: int = 1  # deep

@dataclass
class NestConfig(ComponentConfig):
    '''Options.'''
    adaptor: ComponentSpec = component("adaptors")
    size: int = 8  # big

    def __post_init__(self):
        if self.size % 2:
            raise ValueError(f"size {self.size} is odd")

@hookimpl
def register_adaptors(registry):
    registry.add("small", object, SmallConfig)
    registry.add("plain", object, ComponentConfig)

@hookimpl
def register_generation(registry):
    registry.add("nest", object, NestConfig)
"""


@pytest.fixture
def made_up(tmp_path: Path) -> Plugins:
    (tmp_path / "parts.py").write_text(PLUGIN)
    plugins = Plugins()
    plugins.add_file(tmp_path / "parts.py")
    return plugins


@dataclass
class Inner:
    rate: float = 0.5
    sizes: tuple[int, int, int] | None = None


@dataclass
class Schema:
    generation: ComponentSpec = component("generation")
    several: list[ComponentSpec] = component("adaptors")
    named: dict[str, ComponentSpec] = component("adaptors")
    maybe: ComponentSpec | None = component("adaptors")
    rule: Literal["crop", "fit"] = "crop"
    fill: tuple[int, ...] = (1, 2)
    anything: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    inners: list[Inner] = field(default_factory=list)
    optional: Inner | None = None
    text: str | None = None
    mixed: int | str = 0
    on: bool = False


GOOD = {"generation": {"name": "nest", "adaptor": {"name": "small", "width": 3}}}


def test_components_become_parts_at_any_depth(made_up: Plugins):
    raw = {**GOOD, "several": ["plain", {"name": "small"}], "named": {"a": {"name": "small", "depth": 7}}}
    config = resolve(raw, Schema, made_up)
    assert config.generation.config.adaptor.config.width == 3
    assert [one.name for one in config.several] == ["plain", "small"]
    assert config.named["a"].config.depth == 7
    assert config.maybe is None
    assert [path for path, _ in component_specs(config)] == [
        "generation",
        "generation.adaptor",
        "several[0]",
        "several[1]",
        "named.a",
    ]


def test_values_are_converted_to_their_types(made_up: Plugins):
    raw = {
        **GOOD,
        "rule": "fit",
        "fill": [3, 4, 5],
        "anything": {"a": {"b": [1, None]}},
        "inner": {"rate": "1e-3", "sizes": [1, 2, 3]},
        "inners": [{"rate": 1}],
        "optional": {},
        "mixed": "x",
        "on": True,
    }
    config = resolve(raw, Schema, made_up)
    assert config.fill == (3, 4, 5)
    assert config.anything == {"a": {"b": [1, None]}}
    assert config.inner == Inner(1e-3, (1, 2, 3))
    assert config.inners == [Inner(1.0)]
    assert isinstance(config.inners[0].rate, float)
    assert config.optional == Inner()
    assert (config.mixed, config.on, config.rule) == ("x", True, "fit")


def test_it_goes_back_to_yaml_and_comes_out_the_same(made_up: Plugins, tmp_path: Path):
    raw = {**GOOD, "several": ["small"], "inner": {"rate": 1e-6, "sizes": [1, 2, 3]}, "text": "ünï"}
    config = resolve(raw, Schema, made_up)
    file = tmp_path / "saved.yaml"
    file.write_text(to_yaml(config), "utf-8")
    assert resolve(load(file, plugins=made_up), Schema, made_up) == config
    assert to_plain(config.generation) == {
        "name": "nest",
        "pretrained": None,
        "revision": None,
        "adaptor": {"name": "small", "pretrained": None, "revision": None, "width": 3, "depth": 1},
        "size": 8,
    }


def test_all_errors_are_reported_at_once_with_their_paths(made_up: Plugins):
    raw = {
        "generation": {"name": "nest", "adaptor": {"name": "smal"}, "size": "big"},
        "several": [{"name": "small", "widht": 3}, {"depth": 1}],
        "rule": "stretch",
        "inner": {"sizes": [1, 2]},
        "inners": {"rate": 1},
        "text": "${no.where}",
        "rul": "fit",
    }
    with pytest.raises(ConfigError) as caught:
        resolve(raw, Schema, made_up)
    errors = {fault.path: str(fault) for fault in caught.value.errors}
    assert set(errors) == {
        "generation.adaptor.name",
        "generation.size",
        "several[0].widht",
        "several[1]",
        "rule",
        "inner.sizes",
        "inners",
        "text",
        "rul",
    }
    assert "Did you mean 'small'?" in errors["generation.adaptor.name"]
    assert "Did you mean 'width'?" in errors["several[0].widht"]
    assert "expected one of 'crop', 'fit'" in errors["rule"]
    assert "3 values, each a whole number" in errors["inner.sizes"]
    assert "Did you mean 'rule'?" in errors["rul"]
    assert all(fault in str(caught.value) for fault in ("9 errors", *errors))


def test_an_empty_slot_and_a_null_mapping_are_errors(made_up: Plugins):
    with pytest.raises(
        ConfigError, match=r"generation: missing; expected a generation path.*Registered: nest"
    ):
        resolve({}, Schema, made_up)
    with pytest.raises(ConfigError, match=r"several\[0\]: found 3; expected an adaptor, "):
        resolve({**GOOD, "several": [3]}, Schema, made_up)
    with pytest.raises(ConfigError, match="found 3; expected a mapping"):
        resolve({**GOOD, "inner": 3}, Schema, made_up)


def test_a_value_error_of_a_dataclass_is_reported_with_its_path(made_up: Plugins):
    with pytest.raises(ConfigError, match="generation: size 7 is odd"):
        resolve({"generation": {**GOOD["generation"], "size": 7}}, Schema, made_up)


def test_a_file_cannot_name_code(made_up: Plugins):
    with pytest.raises(ConfigError, match="_target_: unknown key"):
        resolve({"generation": {**GOOD["generation"], "_target_": "os.system"}}, Schema, made_up)


def test_overrides_are_yaml_and_reach_anywhere(made_up: Plugins):
    raw = {**GOOD, "several": [{"name": "small"}]}
    changed = load(
        raw, ["inner.rate=1e-3", "several.0.depth=2", "fill=[1, 2]", "text=null", "on=true"], made_up
    )
    assert changed["inner"] == {"rate": 1e-3}
    assert changed["several"] == [{"name": "small", "depth": 2}]
    assert (changed["fill"], changed["text"], changed["on"]) == ([1, 2], None, True)
    assert raw == {**GOOD, "several": [{"name": "small"}]}


@pytest.mark.parametrize("swap", ["generation.adaptor=plain", "generation.adaptor.name=plain"])
def test_another_name_drops_the_old_components_options(made_up: Plugins, swap: str):
    assert load(GOOD, [swap], made_up)["generation"]["adaptor"] == {"name": "plain"}


def test_options_of_the_new_component_may_come_before_its_name(made_up: Plugins):
    changed = load(GOOD, ["generation.adaptor.revision=x", "generation.adaptor=plain"], made_up)
    assert changed["generation"]["adaptor"] == {"name": "plain", "revision": "x"}


def test_the_same_name_keeps_its_options_and_a_name_that_is_no_component_changes_alone(made_up: Plugins):
    assert load(GOOD, ["generation.adaptor.name=small"], made_up) == GOOD
    schedule = {"schedule": {"name": "constant", "warmup": 3}}
    assert load(schedule, ["schedule.name=cosine"], made_up) == {"schedule": {"name": "cosine", "warmup": 3}}


def test_a_component_in_short_takes_options(made_up: Plugins):
    assert load({"adaptor": "small"}, ["adaptor.width=5"], made_up) == {
        "adaptor": {"name": "small", "width": 5}
    }


@pytest.mark.parametrize("override", ["inner.rate", "=3", "a..b=1", "fill=[1", "several.5.depth=2"])
def test_an_override_that_cannot_be_read_is_an_error(made_up: Plugins, override: str):
    with pytest.raises(ConfigError):
        load({"several": [{"name": "small"}]}, [override], made_up)


def test_interpolations_follow_overrides(made_up: Plugins):
    raw = {"size": 3, "a": {"b": "${size}", "c": ["${a.b}", "x${size}"]}}
    assert load(raw, ["size=4"], made_up) == {"size": 4, "a": {"b": 4, "c": [4, "x4"]}}


def test_the_model_that_a_config_names_is_put_in_place(tmp_path: Path):
    file = tmp_path / "train.yaml"
    file.write_text("model: tiny\nwidth: ${model.backbone.config.hidden_size}\n")
    raw = load(file, ["model.backbone.config.hidden_size=96", "model.generation.tokenizer.num_codes=32"])
    assert raw["width"] == 96
    assert raw["model"]["generation"]["tokenizer"]["num_codes"] == 32
    assert raw["model"]["understanding"] == load("tiny")["understanding"]
    swapped = load(file, ["model.understanding.encoder=siglip", "model=janus_pro_1b", "model.text_sampler=x"])
    assert (
        swapped["model"]["understanding"]["encoder"]
        == {"name": "siglip"} | load("janus_pro_1b")["understanding"]["encoder"]
    )
    assert swapped["model"]["text_sampler"] == "x"


def test_what_is_no_config_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="Did you mean 'model/tiny'"):
        load("model/tini")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    for text, said in (
        ("a: [1", "cannot be read: .* Expected a config in YAML"),
        ("- 1", "expected a mapping"),
        ("a: 1\na: 2", "duplicate"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            load(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="found the keys x"):
        schema_of({"x": 1})


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_is_valid_and_says_what_it_is(name: str):
    lines = shipped()[name].read_text("utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert any(line.startswith("#   janus-modular ") for line in lines[:6])
    for file in re.findall(r"--plugin (\S+)", "\n".join(lines[:6])):
        default_plugins().add_file(Path(__file__).parents[2] / file)
    raw = load(name)
    assert resolve(raw, schema_of(raw))


def test_three_mistakes_in_a_shipped_config_are_three_errors():
    overrides = ["understanding.encoder.layesr=3", "generation.tokenizer=llamagn", "backbone.attention=[1]"]
    with pytest.raises(ConfigError) as caught:
        resolve(load("tiny", overrides), ModelConfig)
    assert {fault.path for fault in caught.value.errors} == {
        "understanding.encoder.layesr",
        "generation.tokenizer.name",
        "backbone.attention",
    }


@pytest.mark.parametrize(
    ("override", "path", "said"),
    [
        ("processor.template=foo", "processor.template", "expected one of 'janus'"),
        ("understanding.encoder.layers=-1", "understanding.encoder.layers", "at least 1"),
        ("understanding.encoder.heads=3", "understanding.encoder", "32 features do not divide by 3 heads"),
        ("generation.tokenizer.num_codes=-5", "generation.tokenizer.num_codes", "-5; expected at least 2"),
        ("generation.tokenizer.code_dim=0", "generation.tokenizer.code_dim", "at least 1"),
    ],
)
def test_values_that_no_model_can_have_are_errors(override: str, path: str, said: str):
    with pytest.raises(ConfigError) as caught:
        resolve(load("tiny", [override]), ModelConfig)
    assert [fault.path for fault in caught.value.errors] == [path]
    assert said in str(caught.value)


@pytest.mark.parametrize(("config", "path"), [("tiny", "generation"), ("demo/digits", "model.generation")])
def test_validate_builds_the_model_and_says_which_part_does_not_fit(config: str, path: str):
    from janus_modular.cli.config import validate

    wide = f"{path}.width=33"
    with pytest.raises(ConfigError, match="32x33 does not divide by its factor 8") as caught:
        validate(config, [wide])
    assert [fault.path for fault in caught.value.errors] == [path]


@pytest.mark.parametrize(
    ("config", "root", "context"),
    [("tiny", "", 17), ("tiny", "", 20), ("demo/digits", "model.", 16), ("janus_pro_1b", "", 576)],
)
def test_validate_refuses_a_context_that_holds_no_image(config: str, root: str, context: int):
    from janus_modular.cli.config import validate

    with pytest.raises(PromptError, match=rf"and (16|576) for the image; the context has {context}\."):
        validate(config, [f"{root}backbone.config.max_position_embeddings={context}"])


def test_validate_refuses_a_short_context_in_the_words_of_drawing():
    from janus_modular.cli.config import validate

    short = "backbone.config.max_position_embeddings=20"
    with pytest.raises(PromptError) as drawing:
        Janus.of(ModelAssembly.from_config(resolve(load("tiny", [short]), ModelConfig))).draw("a")
    with pytest.raises(PromptError) as validating:
        validate("tiny", [short])
    assert str(validating.value) == str(drawing.value)


def test_a_key_of_the_model_in_a_training_config_says_where_it_belongs():
    with pytest.raises(
        ConfigError, match=r"understanding: unknown key; .*Did you mean 'model\.understanding'\?"
    ):
        resolve(load("train/janus_pro/stage1", ["understanding.encoder=siglip"]), TrainConfig)
    with pytest.raises(ConfigError, match=r"steps: unknown key; .*Did you mean 'schedule\.steps'\?"):
        resolve(load("train/janus_pro/stage1", ["steps=3"]), TrainConfig)


def test_a_config_like_a_file_that_is_here_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("model: tiny\n")
    for name in ("mine.yml", "mine"):
        with pytest.raises(ConfigError, match=r"Did you mean 'mine\.yaml'\?"):
            load(name)


def test_validate_refuses_an_unknown_sampler():
    from janus_modular.cli.config import validate

    for key, name in (("text_sampler", "autoregressive"), ("image_sampler", "text")):
        with pytest.raises(ConfigError, match=f"no {key.replace('_', ' ')} is called '{name}'") as caught:
            validate("tiny", [f"{key}={name}"])
        assert [error.path for error in caught.value.errors] == [key]


def test_a_config_of_another_type_is_a_single_error():
    with pytest.raises(ConfigError, match=r"^this is a model config; expected a training config\. See the"):
        resolve(load("tiny"), TrainConfig)
    with pytest.raises(ConfigError, match=r"^this is a training config; expected a model config\. See the"):
        resolve(load("train/janus_pro/stage1"), ModelConfig)


def test_errors_name_plugins_show_only_for_configs_with_components(made_up: Plugins):
    with pytest.raises(ConfigError, match="plugins show NAME"):
        resolve(load("tiny", ["generation.head.deep=1"]), ModelConfig)
    with pytest.raises(ConfigError) as elsewhere:
        resolve(load("tiny", ["processor.deep=1"]), ModelConfig)
    assert "plugins show" not in str(elsewhere.value)
    with pytest.raises(ConfigError) as caught:
        resolve({"wide": 3}, Inner, made_up)
    assert "plugins show" not in str(caught.value)
