"""Discovery and loading of plugins, and errors of broken plugins."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.config import component_specs, load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, MissingExtraError, PluginError
from janus_modular.interfaces import ComponentSpec
from janus_modular.plugins import (
    EntryPointInfo,
    Plugins,
    default_plugins,
    installed,
    set_default_plugins,
)
from janus_modular.plugins.scaffold import write_plugin
from janus_modular.registry import SLOTS
from janus_modular.testing.fixtures import context

GOOD = """
from dataclasses import dataclass
from janus_modular import ComponentConfig, hookimpl

@dataclass
class TwiceConfig(ComponentConfig):
    '''Options.'''
    times: int = 2  # how often

@hookimpl
def register_adaptors(registry):
    registry.add("twice", object, TwiceConfig)
"""

BORROWED = [("understanding_encoders", "vit"), ("adaptors", "mlp"), ("image_tokenizers", "vq")]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path, to install made-up distributions into."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if not name.startswith("janus_"):
            del sys.modules[name]


def install(
    site: Path, dist: str, module: str, source: str, slot: str = "adaptors", name: str = "twice", api: int = 1
):
    info = site / f"{dist.replace('-', '_')}-0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 0.2\n")
    (info / "entry_points.txt").write_text(f"[janus_modular.v{api}.{slot}]\n{name} = {module}\n")
    (site / f"{module}.py").write_text(source)


def found_in(site: Path, **options) -> Plugins:
    return Plugins(installed(metadata.distributions(path=[str(site)])), **options)


def test_our_own_components_are_listed_without_importing_them(plugins: Plugins):
    assert "hf" in plugins.names("backbones")
    assert plugins.names("trackers") == ["jsonl", "mlflow", "tensorboard", "trackio", "wandb"]
    assert {one.slot for one in plugins.entry_points} <= set(SLOTS)


def test_the_installed_metadata_agrees_with_our_pyproject(plugins: Plugins):
    ours = {(one.slot, one.name, one.module) for one in installed() if one.dist == "janus-modular"}
    assert ours == {(one.slot, one.name, one.module) for one in plugins.entry_points}


def test_every_file_that_registers_something_is_announced_and_every_announced_one_is_there(plugins: Plugins):
    root = Path(__file__).parents[2]
    registering = {
        ".".join(path.relative_to(root / folder).with_suffix("").parts)
        for folder, package in (("plugins", "janus_plugins"), ("export", "janus_export"))
        for path in (root / folder / package).rglob("*.py")
        if "\n@hookimpl" in path.read_text("utf-8")
    }
    assert registering == {one.module for one in plugins.entry_points}


def test_only_the_module_of_the_requested_component_is_imported(site: Path):
    install(site, "acme-good", "acme_good", GOOD)
    install(site, "acme-bad", "acme_bad", "raise SystemExit('never import me')", name="bad")
    entry = found_in(site).entry("adaptors", "twice")
    assert entry.plugin == "acme-good 0.2"
    assert entry.config.__name__ == "TwiceConfig"
    assert "acme_bad" not in sys.modules


def test_an_unknown_name_answers_four_questions(plugins: Plugins):
    with pytest.raises(PluginError) as caught:
        plugins.entry("trackers", "json")
    assert str(caught.value).splitlines() == [
        "no tracker is called 'json'.",
        "Did you mean 'jsonl'?",
        "Registered: jsonl, mlflow, tensorboard, trackio, wandb",
        "See them all with: janus-modular plugins list",
    ]


def test_an_unknown_name_like_no_other_may_be_of_a_local_file(plugins: Plugins):
    hint = r"\nA component of a local file needs --plugin FILE\.py, or for every command JANUS_PLUGIN_FILES="
    with pytest.raises(PluginError, match=hint):
        plugins.entry("trackers", "acme-board")


def test_a_name_of_another_slot_is_reported_with_that_slot(plugins: Plugins):
    with pytest.raises(PluginError) as caught:
        plugins.entry("adaptors", "siglip")
    lines = str(caught.value).splitlines()
    assert lines[:2] == [
        "no adaptor is called 'siglip'.",
        "'siglip' is registered as an understanding encoder.",
    ]
    assert "--plugin FILE.py" not in str(caught.value)


def test_a_plugin_that_failed_to_load_is_named_when_requested_and_beside_unknown_names(site: Path):
    install(site, "acme-dino", "acme_dino", "import timmm", slot="backbones", name="dino")
    plugins = found_in(site)
    failure = "Plugin 'dino' (acme-dino 0.2) failed to load: ModuleNotFoundError: No module named 'timmm'"
    with pytest.raises(PluginError) as caught:
        plugins.entry("backbones", "dino")
    assert str(caught.value) == failure
    with pytest.raises(PluginError) as caught:
        plugins.entry("backbones", "tini")
    assert failure in str(caught.value).splitlines()


def test_a_package_of_one_of_our_extras_that_is_missing_gives_the_pip_line(site: Path, monkeypatch):
    install(site, "acme-good", "acme_needs_torch", "import torch\n" + GOOD)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'janus-modular\[torch\]'"):
        found_in(site).entry("adaptors", "twice")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (GOOD.replace("register_adaptors", "register_adapters"), "Did you mean 'register_adaptors'?"),
        (GOOD.replace("(registry):", "(registry, width):"), "'width'"),
        (GOOD.replace('"twice"', '"thrice"'), "registers thrice"),
        (GOOD.replace("TwiceConfig)", "dict)"), "must be a dataclass"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def", "SyntaxError"),
    ],
)
def test_each_error_in_a_plugin_names_the_plugin(site: Path, source: str, said: str):
    install(site, "acme-bad", "acme_faulty", source)
    with pytest.raises(PluginError) as caught:
        found_in(site).entry("adaptors", "twice")
    assert said in str(caught.value)
    assert "acme-bad 0.2" in str(caught.value)


def test_equal_names_of_two_distributions_need_the_distribution(site: Path):
    install(site, "acme-one", "acme_one", GOOD)
    install(site, "acme-two", "acme_two", GOOD)
    plugins = found_in(site)
    with pytest.raises(PluginError, match=r"acme-one 0\.2 and acme-two 0\.2(.|\n)*'acme-one:twice' or"):
        plugins.entry("adaptors", "twice")
    assert plugins.names("adaptors") == ["acme-one:twice", "acme-two:twice"]
    assert plugins.entry("adaptors", "acme-two:twice").plugin == "acme-two 0.2"
    assert found_in(site, disabled=["acme-one"]).entry("adaptors", "twice").plugin == "acme-two 0.2"


def test_one_that_has_a_built_in_name_is_the_one_to_switch_off(site: Path, plugins: Plugins):
    install(site, "acme-one", "acme_one", GOOD, name="mlp")
    install(site, "zzz-two", "zzz_two", GOOD, name="linear")
    plugins = Plugins([*plugins.entry_points, *found_in(site).entry_points])
    for name, dist in (("mlp", "acme-one"), ("linear", "zzz-two")):
        with pytest.raises(PluginError) as caught:
            plugins.find("adaptors", name)
        assert f"JANUS_DISABLE_PLUGINS={dist}:{name}" in str(caught.value)
        assert f"'janus-modular:{name}'" in str(caught.value)
        off = Plugins(plugins.entry_points, disabled=[f"{dist}:{name}"])
        assert off.find("adaptors", name).dist == "janus-modular"


def test_the_recorded_component_is_selected_among_equal_names(site: Path):
    install(site, "acme-one", "acme_one", GOOD)
    then = found_in(site)
    needed = then.required([ComponentSpec("adaptors", "twice", None)])
    assert then.as_recorded(needed).full_name("adaptors", "twice") == "twice"
    install(site, "acme-two", "acme_two", GOOD)
    now = found_in(site).as_recorded(needed)
    assert now.find("adaptors", "twice").dist == "acme-one"
    assert now.full_name("adaptors", "twice") == "acme-one:twice"
    assert now.find("adaptors", "acme-two:twice").dist == "acme-two"


def test_shipped_configs_select_built_in_components_and_typed_names_are_ambiguous(plugins: Plugins):
    others = [EntryPointInfo(slot, name, "acme", "acme-vit", "0.2") for slot, name in BORROWED]
    plugins = Plugins([*plugins.entry_points, *others])
    config = resolve(load("tiny", plugins=plugins), ModelConfig, plugins)
    assert {
        one.dist for one in (plugins.find(part.slot, part.name) for _, part in component_specs(config))
    } == {"janus-modular"}
    with pytest.raises(
        ConfigError, match=r"2 plugins provide the understanding encoder 'vit'(.|\n)*'acme-vit:vit'"
    ):
        resolve(load("tiny", ["understanding.encoder.name=vit"], plugins), ModelConfig, plugins)
    named = ["understanding.encoder.name=acme-vit:vit"]
    assert load("tiny", named, plugins)["understanding"]["encoder"] == {"name": "acme-vit:vit"}


def test_a_component_is_checked_whoever_borrows_the_names_of_what_is_around_it(plugins: Plugins):
    others = [EntryPointInfo(slot, name, "acme", "acme-vit", "0.2") for slot, name in BORROWED]
    plugins = Plugins([*plugins.entry_points, *others])
    for slot, name in (
        ("adaptors", "linear"),
        ("adaptors", "janus-modular:mlp"),
        ("generation", "autoregressive"),
    ):
        component, _ = context(plugins, slot, name)()
        assert component.num_tokens
    _, example = context(plugins, "heads", "mlp")()  # shared in another slot only
    assert len(example)


def test_the_list_and_a_new_plugin_know_which_names_are_shared(plugins: Plugins, tmp_path: Path):
    with pytest.raises(PluginError, match=r"janus-modular .* provides an adaptor called 'mlp' already"):
        write_plugin("mlp", "adaptors", tmp_path)
    assert not list(tmp_path.iterdir())
    set_default_plugins(plugins)
    assert "is offered by" not in CliRunner().invoke(app, ["plugins", "list"]).stdout
    set_default_plugins(
        Plugins([*plugins.entry_points, EntryPointInfo("adaptors", "mlp", "acme", "acme", "0.2")])
    )
    listed = CliRunner().invoke(app, ["plugins", "list"]).stdout
    assert "write 'janus-modular:mlp' or 'acme:mlp'" in listed.splitlines()[-1]


@pytest.mark.parametrize("word", ["twice", "adaptors:twice", "acme-good", "acme-good:twice"])
def test_switching_off_hides_and_says_so(site: Path, word: str):
    install(site, "acme-good", "acme_good", GOOD)
    plugins = found_in(site, disabled=[word])
    assert plugins.names("adaptors") == []
    with pytest.raises(PluginError, match=f"disabled by JANUS_DISABLE_PLUGINS={word}"):
        plugins.entry("adaptors", "twice")


def test_a_newer_plugin_api_is_refused_unread(site: Path):
    install(site, "acme-new", "acme_new", "raise AssertionError('must not be imported')", api=2)
    with pytest.raises(PluginError, match=r"version 2 of the plugin API(.|\n)*--upgrade janus-modular"):
        found_in(site).entry("adaptors", "twice")


def test_a_distribution_for_both_versions_is_read_in_the_supported_version(site: Path):
    install(site, "acme-both", "acme_both", GOOD, api=2)
    points = site / "acme_both-0.2.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "[janus_modular.v1.adaptors]\ntwice = acme_both\n")
    assert found_in(site).entry("adaptors", "twice")


def test_an_unknown_name_imports_no_plugin_of_others(site: Path, plugins: Plugins):
    install(site, "acme-good", "acme_good", GOOD)
    everything = Plugins([*plugins.entry_points, *found_in(site).entry_points])
    with pytest.raises(PluginError, match="no adaptor is called 'dinov2'"):
        everything.find("adaptors", "dinov2")
    assert "acme_good" not in sys.modules


def test_strict_makes_every_broken_plugin_an_error(site: Path):
    install(site, "acme-good", "acme_good", GOOD)
    install(site, "acme-bad", "acme_bad", "1 / 0", name="bad")
    install(site, "acme-typo", "acme_typo", GOOD, slot="adapters")
    with pytest.raises(PluginError, match=r"acme-typo(.|\n)*no slot 'adapters'(.|\n)*acme-bad"):
        found_in(site, strict=True).entry("adaptors", "twice")


def test_a_local_file_needs_no_packaging(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(GOOD)
    plugins = Plugins()
    assert [(one.slot, one.name) for one in plugins.add_file(file)] == [("adaptors", "twice")]
    assert plugins.add_file(file) == []  # twice is once
    config = plugins.entry("adaptors", "twice").config()
    assert plugins.required([ComponentSpec("adaptors", "twice", config)]) == [
        {"slot": "adaptors", "name": "twice", "dist": None, "version": None, "file": "mine.py"}
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "no plugin file"),
        ("x = 1", "registers nothing"),
        ("1 / 0", "ZeroDivisionError"),
        (GOOD.replace("register_adaptors", "register_adaptor"), "Did you mean"),
    ],
)
def test_a_local_file_that_does_not_work_is_an_error_at_once(tmp_path: Path, source: str | None, said: str):
    file = tmp_path / "mine.py"
    if source is not None:
        file.write_text(source)
    with pytest.raises(PluginError, match=said):
        Plugins().add_file(file)


def test_the_environment_says_what_is_off_and_which_files_are_loaded(tmp_path: Path, monkeypatch):
    (tmp_path / "mine.py").write_text(GOOD)
    monkeypatch.setenv("JANUS_PLUGIN_FILES", str(tmp_path / "mine.py"))
    monkeypatch.setenv("JANUS_DISABLE_PLUGINS", "mlp, sources:digits")
    set_default_plugins(None)
    names = default_plugins().names("adaptors")
    assert "twice" in names
    assert "mlp" not in names
    assert "digits" not in default_plugins().names("sources")


def test_a_missing_file_of_the_environment_is_an_error_each_time_that_names_the_variable(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("JANUS_PLUGIN_FILES", str(tmp_path / "gone.py"))
    set_default_plugins(None)
    for _ in range(2):
        with pytest.raises(PluginError, match=r"no plugin file .*gone\.py") as error:
            default_plugins()
        assert error.value.__notes__ == ["The file is named in JANUS_PLUGIN_FILES."]


def test_what_a_checkpoint_needs_is_recorded_and_checked(plugins: Plugins):
    needed = plugins.required(
        [ComponentSpec("adaptors", "mlp", None), ComponentSpec("adaptors", "mlp", None)]
    )
    assert [(one["slot"], one["name"], one["dist"]) for one in needed] == [
        ("adaptors", "mlp", "janus-modular")
    ]
    plugins.check_required(needed)
    gone = EntryPointInfo("heads", "deep", "acme_deep", "acme-deep", "1.2")
    with pytest.raises(PluginError, match=r"head 'deep' is not installed: pip install acme-deep==1\.2"):
        plugins.check_required(Plugins([gone]).required([ComponentSpec("heads", "deep", None)]))
    with pytest.raises(PluginError, match="its record does not name the plugin"):
        plugins.check_required([{"slot": "heads", "name": "deep"}])


@pytest.mark.parametrize(
    ("api", "version", "disabled", "expected"),
    [
        (
            1,
            "0.2",
            ["acme-good"],
            "of acme-good 0.2 is disabled by JANUS_DISABLE_PLUGINS=acme-good; to use it, unset the variable",
        ),
        (
            1,
            "0.2",
            ["twice"],
            "of acme-good 0.2 is disabled by JANUS_DISABLE_PLUGINS=twice; to use it, unset the variable",
        ),
        (
            2,
            "0.2",
            [],
            "cannot be loaded: it is written for version 2 of the plugin API, this is version 1;"
            " upgrade with: pip install --upgrade janus-modular",
        ),
        (
            2,
            "0.1",
            [],
            "--upgrade janus-modular, or install what the model was saved with: pip install acme-good==0.1",
        ),
        (0, "0.2", [], "this is version 1; upgrade with: pip install --upgrade acme-good"),
        (1, "0.2", None, "is not in acme-good 0.2, which is installed: pip install acme-good==0.2"),
    ],
)
def test_a_recorded_plugin_that_is_installed_is_not_reported_as_missing(
    site: Path, api: int, version: str, disabled: list[str] | None, expected: str
) -> None:
    install(site, "acme-good", "acme_good", GOOD, api=api, name="other" if disabled is None else "twice")
    record = {"slot": "adaptors", "name": "twice", "dist": "acme-good", "version": version, "file": None}
    with pytest.raises(PluginError) as error:
        found_in(site, disabled=disabled or []).check_required([record])
    assert str(error.value).splitlines()[-1].endswith(expected)
    assert "is not installed" not in str(error.value)
    assert "acme_good" not in sys.modules


def test_an_older_plugin_api_is_an_error_that_names_the_plugin_to_upgrade(site: Path):
    install(site, "acme-old", "acme_old", GOOD, api=0)
    with pytest.raises(PluginError, match=r"version 0 of the plugin API(.|\n)*--upgrade acme-old"):
        found_in(site).entry("adaptors", "twice")
