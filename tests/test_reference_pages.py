"""docs/reference agrees with the code: hooks, components, checks, errors, commands, fields."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import get_annotations, isfunction, signature
from pathlib import Path
from typing import Any

import pytest
import typer.main

import janus_modular
from janus_modular.cli.app import app
from janus_modular.config.schema import ProcessorConfig
from janus_modular.graph_specs import sample_text_tensors
from janus_modular.interfaces import GenerationPath, PixelSpec
from janus_modular.plugins import Plugins
from janus_modular.plugins.options import options_of
from janus_modular.plugins.scaffold import slot_named
from janus_modular.processing import sample_images
from janus_modular.registry import SLOTS
from janus_modular.testing.fixtures import context
from janus_plugins.generation.autoregressive import AutoregressiveGeneration

ROOT = Path(__file__).parents[1]


def hooks_of_site(name: str) -> Any:
    """Import a file that completes pages when the site is built: slot_pages, catalogue."""
    spec = spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    pages = module_from_spec(spec)
    spec.loader.exec_module(pages)
    return pages


def slot_page(slot: str, plugins: Plugins) -> str:
    """Return the page of a slot as the site has it."""
    written = (ROOT / f"docs/reference/slots/{slot}.md").read_text("utf-8")
    return str(hooks_of_site("slot_pages").complete(written, slot, plugins))


def test_every_hook_is_documented_with_its_arguments():
    heads = re.findall(r"^### `(.+)`$", (ROOT / "docs/reference/hooks.md").read_text("utf-8"), re.MULTILINE)
    assert heads == [f"register_{slot}(registry)" for slot in SLOTS]


def test_the_table_of_plugins_new_lists_every_slot():
    text = (ROOT / "docs/reference/cli.md").read_text("utf-8")
    section = text.partition("## `plugins new`")[2].partition("\n## ")[0]
    [row] = re.findall(r"^\| `--slot` .*$", section, re.MULTILINE)
    assert [slot_named(word) for word in re.findall(r"`([\w-]+)`", row)[1:]] == list(SLOTS)


def test_the_graphs_that_choose_ids_are_documented_with_their_arguments():
    text = (ROOT / "docs/reference/sessions.md").read_text("utf-8")
    tables = text.partition("## Graphs that choose ids")[2].partition("\n- ")[0].split("| argument of")[1:]
    documented = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables]
    generation = AutoregressiveGeneration.sample_image
    assert documented == [
        [tensor.name for tensor in sample_text_tensors(1, 1)[0]],
        [*get_annotations(generation)][:-1],
    ]


def test_the_helpers_of_objectives_are_documented():
    text = (ROOT / "docs/reference/slots/objectives.md").read_text("utf-8")
    calls = re.findall(r"^\| `(\w+)\((.*)\)` \|", text, re.MULTILINE)
    own = [
        name
        for name, value in vars(sample_images).items()
        if isfunction(value) and value.__module__ == sample_images.__name__
    ]
    assert sorted(own) == sorted(dict(calls))
    for name, arguments in calls:
        assert list(signature(vars(sample_images)[name]).parameters) == arguments.split(", ")
        assert hasattr(janus_modular, name)


def test_every_component_is_in_the_table_of_its_slot(plugins: Plugins):
    text = (ROOT / "docs/reference/components.md").read_text("utf-8")
    sections = dict(re.findall(r"^## [^\n]*`(\w+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    listed = {
        slot: re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE) for slot, section in sections.items()
    }
    assert {slot: sorted(names) for slot, names in listed.items()} == {
        slot: plugins.names(slot) for slot in SLOTS
    }


@pytest.mark.parametrize("slot", SLOTS)
def test_every_option_of_every_component_has_a_comment(slot: str, plugins: Plugins):
    bare = [
        f"{name}.{option['name']}"
        for name in plugins.names(slot)
        for option in options_of(plugins.entry(slot, name).config)
        if not option["comment"]
    ]
    assert bare == []


def test_every_check_is_documented_with_its_slot():
    from janus_modular.registry import MODEL_SLOTS
    from janus_modular.testing import checks_of

    text = (ROOT / "docs/reference/testing.md").read_text("utf-8")
    sections = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    row = re.compile(r"^\| `(\w+)` \| (.*) \|(?: (slow) \|| \|)$", re.MULTILINE)
    tables = {head: row.findall(section) for head, section in sections.items()}
    documented = {
        slot: {*(tables["All model components"] if slot in MODEL_SLOTS else ()), *tables[head]}
        for slot in SLOTS
        for head in tables
        if head.endswith(f"`{slot}`")
    }
    assert documented == {
        slot: {
            (check.name, check.promise.rstrip("."), "slow" if check.slow else "") for check in checks_of(slot)
        }
        for slot in SLOTS
    }


def test_every_error_is_documented():
    from janus_modular import errors

    text = (ROOT / "docs/reference/errors.md").read_text("utf-8")
    known = {
        name
        for name, item in vars(errors).items()
        if isinstance(item, type) and issubclass(item, errors.JanusError)
    }
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == known


def test_every_attribute_of_results_is_documented():
    from janus_modular import answers

    text = (ROOT / "docs/reference/janus.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.*?`) \| (`\w+`(?:, `\w+`)*) \|", text.partition("## Results")[2], re.MULTILINE)
    documented = {(name.strip("`"), item.strip("`")) for name, items in rows for item in items.split(", ")}
    usage = answers.Usage(prompt_tokens=1)
    results = {
        "Answer": answers.Answer("", None, usage),
        "Drawings": answers.Drawings([], [usage]),
        "Usage": usage,
    }
    for name, result in results.items():
        own = {word for word in dir(result) if word[0] != "_"} - {*dir(str), *dir(list)}
        methods = {word for word in own if callable(getattr(result, word))}
        assert {key for key, item in documented if item == name} == own - methods, name


def test_every_setting_of_the_built_in_samplers_is_documented(plugins: Plugins):
    text = (ROOT / "docs/reference/janus.md").read_text("utf-8")
    section = text.partition("## Settings and seeds")[2].partition("## ")[0]
    settings = [
        *options_of(plugins.entry("text_samplers", "text").config),
        *options_of(plugins.entry("image_samplers", "autoregressive").config),
    ]
    names = {row["name"] for row in settings} - {"numbers"}  # set by `chat` and `draw`
    documented = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    assert {name.strip("`") for row in documented for name in row.split(", ")} == names


def test_every_manifest_key_and_the_schema_are_documented():
    page = ROOT / "docs/reference/bundle.md"
    schema = json.loads((ROOT / "export/janus_export/bundle.schema.json").read_text("utf-8"))
    text = page.read_text("utf-8")
    keys = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert keys == list(schema["properties"])  # in the order of the schema, which is the manifest's
    assert re.search(r'^```json.*\n--8<-- "bundle.schema.json"\n```$', text, re.MULTILINE)


def test_every_command_is_documented_with_its_options():
    text = (ROOT / "docs/reference/cli.md").read_text("utf-8")
    sections = dict(re.findall(r"^## `([\w -]+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    group: Any = typer.main.get_command(app)

    def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        names = command.list_commands(None) if hasattr(command, "list_commands") else ()
        for name in names:
            yield from leaves(command.get_command(None, name), f"{path} {name}".strip())
        if not names:
            yield path, command

    known = dict(leaves(group, ""))
    assert set(sections) == set(known)
    for path, command in known.items():
        options = {name for option in command.params for name in option.opts if name.startswith("-")}
        rows = {
            name
            for row in re.findall(r"^\| (`-.*?`) \|", sections[path], re.MULTILINE)
            for name in row.split(", ")
        }
        assert {name.strip("`") for name in rows} == options, path


@pytest.mark.parametrize(
    "section",
    [
        "A training run",
        "An evaluation",
        "bad_samples",
        "optimizer",
        "schedule",
        "processor",
        "pixels",
        "A server",
        "limits",
        "ray",
    ],
)
def test_every_field_is_documented(section: str):
    from janus_modular.evaluation.schema import EvalConfig
    from janus_modular.server.settings import LimitsConfig, RayConfig, ServerConfig
    from janus_modular.training import schema

    classes = {
        "A server": ServerConfig,
        "limits": LimitsConfig,
        "ray": RayConfig,
        "An evaluation": EvalConfig,
        "A training run": schema.TrainConfig,
        "bad_samples": schema.BadSamplesConfig,
        "optimizer": schema.OptimizerConfig,
        "schedule": schema.ScheduleConfig,
        "processor": ProcessorConfig,
        "pixels": PixelSpec,
    }
    text = (ROOT / "docs/reference/config.md").read_text("utf-8")
    body = re.split(r"^##+ ", text.partition(f"# {section}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    rows = re.findall(r"^\| (`.*?`) \|", body, re.MULTILINE)
    assert {name.strip("`") for row in rows for name in row.split(", ")} == {
        field.name for field in fields(classes[section])
    }


RELATED = {
    "understanding_encoders": [
        "interfaces.PixelSpec",
        "capabilities.ReadsPretrained",
        "capabilities.LoadsPretrained",
    ],
    "generation": ["interfaces.GenerationPath", "model.sampling.sample_with_noise"],
    "text_samplers": ["protocols.TextSampler", "protocols.TextSamplerSettings", "protocols.Session"],
    "image_samplers": ["protocols.ImageSampler", "protocols.Session", "sequence.unconditional"],
    "backbones": ["interfaces.Backbone", "interfaces.Cache", "capabilities.LoadsPretrained"],
    "sources": ["protocols.Source", "sequence.Sample", "sequence.Message", "sequence.ImageTarget"],
    "formats": ["protocols.CheckpointFormat", "capabilities.ReadsPretrained"],
}


@pytest.mark.parametrize("slot", RELATED)
def test_slot_pages_document_related_classes(slot: str, plugins: Plugins):
    written = re.findall(r"^::: janus_modular\.([\w.]+)$", slot_page(slot, plugins), re.MULTILINE)
    assert set(RELATED[slot]) <= set(written)


def test_the_hook_of_generation_paths_names_every_member():
    text = (ROOT / "docs/reference/hooks.md").read_text("utf-8")
    paragraph = text.partition("### `register_generation(registry)`")[2].partition("###")[0]
    members = [name for name in (*get_annotations(GenerationPath), *vars(GenerationPath)) if name[0] != "_"]
    assert [name for name in members if f"`{name}`" not in paragraph] == []


def test_every_slot_has_a_page_with_its_interface_and_components(plugins: Plugins):
    nav = re.findall(r"reference/slots/(\w+)\.md", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert sorted(nav) == sorted(SLOTS)
    for slot in SLOTS:
        text = slot_page(slot, plugins)
        assert re.findall(r"^### `([\w-]+)`$", text, re.MULTILINE) == plugins.names(slot)
        for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE):
            module, _, name = path.rpartition(".")
            assert hasattr(import_module(module), name)
    assert "| `depth` | `2` | linear layers: C -> D, then D -> D; Janus and Janus-Pro have 2 |" in slot_page(
        "adaptors", plugins
    )
    assert "| `feature_dim` | `int` | C |" in slot_page("understanding_encoders", plugins)


@pytest.mark.parametrize("slot", SLOTS)
def test_slot_pages_say_when_to_choose_each_component(slot: str, plugins: Plugins):
    text = slot_page(slot, plugins)
    choices = text.partition("## Which one to choose")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", choices, re.MULTILINE)) == plugins.names(slot)
    assert [line for line in text.splitlines() if re.search(r"\| *\|", line)] == []  # no empty cell


@pytest.mark.parametrize("slot", SLOTS)
def test_the_example_of_a_slot_page_registers_a_component_that_can_be_built(
    slot: str, plugins: Plugins, tmp_path: Path
):
    [(path, text), _] = hooks_of_site("slot_pages").example_files(slot).items()
    assert f"```python\n{text}```" in slot_page(slot, plugins)
    file = tmp_path / Path(path).name
    file.write_text(text, "utf-8")
    extended = Plugins(plugins.entry_points)
    [info] = extended.add_file(file)
    assert info.slot == slot
    entry = extended.entry(slot, info.name)
    if slot in hooks_of_site("slot_pages").UNCHECKED:
        entry.factory(entry.config(), *([tmp_path] if slot == "runtimes" else []))
    else:
        component, _ = context(extended, slot, info.name)()
        assert component is not None


CATALOGUE = hooks_of_site("catalogue")
CHECK_RESULTS = json.loads((ROOT / "docs/check_results.json").read_text("utf-8"))
QUICK = ("adaptors:linear", "heads:mlp", "trackers:", "text_samplers:", "image_samplers:", "sources:digits")


def test_the_catalogue_has_a_result_for_every_check_of_every_component(plugins: Plugins):
    from janus_modular.testing import checks_of

    components = CATALOGUE.built_ins(plugins)
    assert CHECK_RESULTS.keys() == {key for key in components if CATALOGUE.is_checkable(key)}
    for key, outcomes in CHECK_RESULTS.items():
        slot = key.partition(":")[0]
        assert outcomes.keys() == {check.name for check in checks_of(slot) if not check.slow}, key
    failed = {key for key, outcomes in CHECK_RESULTS.items() if "failed" in outcomes.values()}
    assert failed == CATALOGUE.EXPECTED_FAILURES.keys()
    listed = re.findall(r"^\| \[`([\w-]+)`\]\(slots/(\w+)\.md", CATALOGUE.tables(plugins), re.MULTILINE)
    assert sorted(f"{slot}:{name}" for name, slot in listed) == sorted(components)


@pytest.mark.parametrize(
    "key",
    [
        # The checks themselves are those of tests/plugins/test_contracts.py, whose slow ones run before.
        key if key.startswith(QUICK) else pytest.param(key, marks=pytest.mark.proof)
        for key in sorted(CHECK_RESULTS)
    ],
)
def test_the_results_in_the_catalogue_are_those_of_the_checks(key: str, plugins: Plugins):
    """Store them with ``python docs/catalogue.py``."""
    assert CATALOGUE.check(plugins, key) == CHECK_RESULTS[key]
