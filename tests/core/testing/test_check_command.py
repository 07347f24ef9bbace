"""``plugins check``: the checks of a component by its name, in small surroundings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from janus_modular.cli.app import app
from janus_modular.plugins import Plugins
from janus_modular.testing import check, running
from janus_modular.testing.fixtures import EXAMPLES, context

LARGE_OR_ASKING = (  # by their defaults
    *("siglip", "llamagen", "vqgan", "ibq", "hf-vq", "hf-vision"),
    *("image-folder", "jsonl", "parquet", "webdataset"),
    *("wandb", "mlflow", "trackio", "emoji"),  # by extras, and by images of a package
)

MIXES = """
from dataclasses import dataclass
from torch import nn
from janus_modular import Adaptor, ComponentConfig, Registry, hookimpl

@dataclass
class MixesConfig(ComponentConfig):
    strength: float = 1.0  # of the mixing

class Mixes(nn.Module):
    def __init__(self, config, input_dim, output_dim):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(input_dim, output_dim)
    def num_tokens(self, grid):
        return grid[0] * grid[1]
    def forward(self, features, grid):
        return self.layer(features - self.config.strength * features.mean(0))

@hookimpl
def register_adaptors(registry: Registry[Adaptor]) -> None:
    registry.add("mixes", Mixes, MixesConfig)
"""

ONE_CODE_ONLY = """
from dataclasses import dataclass
from torch import nn
from janus_modular import Head, ComponentConfig, Registry, hookimpl

@dataclass
class SameConfig(ComponentConfig):
    refuses: bool = False  # what it is not made for

class Same(nn.Module):
    def __init__(self, config, width, codebooks):
        super().__init__()
        if config.refuses and len(codebooks) > 1:
            raise ValueError("one code a position")
        self.config, self.codebooks = config, codebooks
        self.outputs = nn.ModuleList(nn.Linear(width, size) for size in codebooks)
    def forward(self, hidden, before):
        return self.outputs[before.shape[-1]](hidden)

@hookimpl
def register_heads(registry: Registry[Head]) -> None:
    registry.add("same", Same, SameConfig)
"""


@pytest.fixture(autouse=True)
def _without_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that other packages bring are tested where those packages are."""
    monkeypatch.setattr(running, "entry_points", lambda group: [])
    running.checks_of("heads")  # imports our own
    ours = {
        name: one for name, one in check.REGISTERED.items() if one.run.__module__.startswith("janus_modular")
    }
    monkeypatch.setattr(running, "REGISTERED", ours)


def check_as_json(*words: str) -> tuple[int, dict[str, dict]]:
    done = CliRunner().invoke(app, ["plugins", "check", *words, "--json"])
    return done.exit_code, {one["check"]: one for one in json.loads(done.stdout)["checks"]}


def test_a_component_is_checked_by_its_name() -> None:
    code, checks = check_as_json("vit")
    assert code == 0
    assert checks["batch_invariance"]["outcome"] == "passed"
    assert checks["sharding"]["note"] == "it is slow: run it with --slow"


def test_a_failed_check_is_printed_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "mixes.py").write_text(MIXES)
    file = ("--plugin", str(tmp_path / "mixes.py"))
    code, checks = check_as_json("mixes", *file)
    assert code == 1
    assert [name for name, one in checks.items() if one["outcome"] == "failed"] == ["batch_invariance"]
    assert "row 0 alone and in a batch" in checks["batch_invariance"]["note"]
    code, _ = check_as_json("mixes", "strength=0", *file)  # an option is the component's
    assert code == 0
    table = CliRunner().invoke(app, ["plugins", "check", "mixes", *file])
    assert table.exit_code == 1
    assert "\n9 passed, 1 failed, 1 skipped" in table.stdout


def test_a_distribution_is_checked_with_all_its_components(tmp_path: Path) -> None:
    file = tmp_path / "both.py"
    file.write_text(ONE_CODE_ONLY.replace('"same"', '"both.py"') + MIXES)
    line = ["plugins", "check", "both.py", "--plugin", str(file)]
    done = CliRunner().invoke(app, [*line, "--json"])
    reports = json.loads(done.stdout)
    assert [(report["slot"], report["name"]) for report in reports] == [
        ("adaptors", "mixes"),
        ("heads", "both.py"),
    ]
    failed = [row["check"] for report in reports for row in report["checks"] if row["outcome"] == "failed"]
    assert (failed, done.exit_code) == (["batch_invariance", "head_order"], 1)
    code, checks = check_as_json("heads:both.py", "refuses=true", "--plugin", str(file))
    assert (code, checks["head_order"]["outcome"]) == (0, "skipped")
    refused = CliRunner().invoke(app, [*line, "refuses=true"])
    assert (
        "a distribution of 2 components; expected one component: write adaptors:mixes or heads:both.py"
        in refused.stderr
    )
    assert refused.exit_code == 2


FORMAT = """
from dataclasses import dataclass
from janus_modular import hookimpl

@dataclass
class Options:
    pass

@hookimpl
def register_formats(registry):
    registry.add("acme", object, Options)
"""


def test_a_format_beside_other_components_is_left_to_tests(tmp_path: Path) -> None:
    file = tmp_path / "both.py"
    file.write_text(FORMAT + MIXES.replace("= 1.0", "= 0.0"))
    done = CliRunner().invoke(app, ["plugins", "check", "both.py", "--plugin", str(file)])
    assert "not checked: formats:acme: no example fits every checkpoint format" in done.stderr
    assert ("mixes: adaptor of both.py" in done.stdout, done.exit_code) == (True, 0)


def test_components_of_a_distribution_that_cannot_be_checked_are_listed_at_the_end(tmp_path: Path) -> None:
    file = tmp_path / "both.py"
    file.write_text(NO_LENGTH + MIXES.replace("= 1.0", "= 0.0"))
    done = CliRunner().invoke(app, ["plugins", "check", "both.py", "--plugin", str(file)])
    assert done.exit_code == 2
    assert "mixes: adaptor of both.py" in done.stdout
    assert "not checked:\nsources:words: the source 'words' cannot be checked" in done.stderr


def test_a_head_is_checked_for_several_codes_unless_it_refuses_them(tmp_path: Path) -> None:
    (tmp_path / "same.py").write_text(ONE_CODE_ONLY)
    file = ("--plugin", str(tmp_path / "same.py"))
    code, checks = check_as_json("same", *file)
    assert code == 1
    assert [name for name, one in checks.items() if one["outcome"] == "failed"] == ["head_order"]
    code, checks = check_as_json("same", "refuses=true", *file)
    assert code == 0
    assert checks["head_order"]["outcome"] == "skipped"
    code, checks = check_as_json("factorized")
    assert code == 0
    assert checks["head_order"]["outcome"] == "passed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mlp"], "'mlp' means 2 components: write adaptors:mlp or heads:mlp"),
        (["vitt"], "Did you mean 'vit'?"),
        (["vit", "feature_dmi=3"], "Did you mean 'feature_dim'?"),
        (["hf-vision"], "give config"),
        (["formats:published"], "write a test"),
    ],
)
def test_what_cannot_be_checked_says_why(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["plugins", "check", *words])
    assert done.exit_code == 2
    assert said in done.stderr


NO_LENGTH = """
from dataclasses import dataclass

from janus_modular import ComponentConfig, hookimpl


@dataclass
class Options(ComponentConfig):
    length: float | None = 2.5


class Words:
    def __init__(self, config):
        if config.length is not None:
            self.length = config.length

    def __len__(self):
        return self.length


@hookimpl
def register_sources(registry):
    registry.add("words", Words, Options)
"""


@pytest.mark.parametrize(
    ("option", "said"), [("length=2.5", "TypeError: 'float'"), ("length=null", "length")]
)
def test_a_part_that_no_example_can_be_made_from_is_named(tmp_path: Path, option: str, said: str) -> None:
    (tmp_path / "words.py").write_text(NO_LENGTH)
    line = ["plugins", "check", "words", option, "--plugin", str(tmp_path / "words.py")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 2
    assert "the source 'words' cannot be checked" in done.stderr
    assert said in done.stderr


def test_every_built_in_of_a_slot_with_examples_can_be_built_or_asks_for_options(plugins: Plugins) -> None:
    for one in plugins.entry_points:
        if one.slot in EXAMPLES and one.name not in LARGE_OR_ASKING:
            component, example = context(plugins, one.slot, one.name)()
            assert component is not None
            assert example is not None


def test_wrong_options_name_the_component(plugins: Plugins, tmp_path: Path) -> None:
    (tmp_path / "mixes.py").write_text(
        MIXES.replace(
            "# of the mixing", "\n    def __post_init__(self):\n        raise ValueError('none fits')"
        )
    )
    done = CliRunner().invoke(
        app, ["--plugin", str(tmp_path / "mixes.py"), "plugins", "check", "mixes", "strength=2"]
    )
    assert done.exit_code == 2
    assert done.stderr.splitlines() == ["the config of the adaptor 'mixes' has an error:", "  none fits"]
