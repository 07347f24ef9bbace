"""The command line, run in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from janus_modular.cli.app import app

HEAVY = ("torch", "transformers", "numpy", "jinja2")
PLUGIN = """
print("hello from the plugin")
from dataclasses import dataclass
from janus_modular import ComponentConfig, hookimpl

@dataclass
class TwiceConfig(ComponentConfig):
    '''Options.'''
    times: int = 2  # how often

@hookimpl
def register_adaptors(registry):
    '''Offer it.'''
    registry.add("twice", object, TwiceConfig)
"""


def janus(*args: str, python: tuple[str, ...] = ("-m", "janus_modular"), **env: str):
    return subprocess.run(
        [sys.executable, *python, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **env},
        check=False,
    )


def only(site: Path, dist: str, source: str, slot: str = "adaptors", name: str = "twice") -> str:
    """Install a made-up distribution; return the words that switch every other one off."""
    info = site / f"{dist}-0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 0.2\n")
    (info / "entry_points.txt").write_text(f"[janus_modular.v1.{slot}]\n{name} = {dist}_module\n")
    (site / f"{dist}_module.py").write_text(source)
    return "janus-modular"


@pytest.mark.parametrize(
    ("words", "expected"), [("ch", "chat"), ("ex", "export"), ("draw --gu", "--guidance")]
)
def test_a_shell_completes_commands_and_options(words: str, expected: str):
    """`export` is a command of another package."""
    line = f"janus-modular {words}"
    program = "import sys; sys.argv[0] = 'janus-modular'; from janus_modular.cli.app import main; main()"
    variables = {
        "_JANUS_MODULAR_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    assert janus(python=("-c", program), **variables).stdout.split() == [expected]


def test_a_component_with_the_name_of_its_distribution_is_shown(tmp_path: Path):
    """As `plugins new` makes it."""
    only(tmp_path, "twice", PLUGIN, name="twice")
    done = janus("plugins", "show", "twice", PYTHONPATH=str(tmp_path))
    assert done.stdout.startswith("twice: adaptor of twice 0.2"), done.stderr


def test_components_are_listed_by_slot():
    rows = json.loads(janus("plugins", "list", "--slot", "heads", "--json").stdout)
    assert {row["slot"] for row in rows} == {"heads"}
    assert "mlp" in {row["name"] for row in rows}
    assert json.loads(janus("plugins", "list", "--slot", "head", "--json").stdout) == rows  # as `plugins new`
    refused = janus("plugins", "list", "--slot", "haeds")
    assert refused.returncode == 2
    assert "there is no slot 'haeds'. Did you mean 'heads'?\n" in refused.stderr


@pytest.mark.parametrize(
    "line", [["--help"], ["plugins", "list"], ["plugins", "list", "--json"], ["config", "list"]]
)
def test_listing_commands_import_no_heavy_package(line: list[str]):
    code = (
        "import sys\nfrom janus_modular.cli.app import app\n"
        f"try: app({line!r})\nexcept SystemExit as stop: assert not stop.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = janus(python=("-c", code))
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_the_json_list_holds_the_location_of_each_component():
    rows = json.loads(janus("plugins", "list", "--json").stdout)
    mlp = next(row for row in rows if (row["slot"], row["name"]) == ("adaptors", "mlp"))
    assert mlp["where"] == "janus_plugins.adaptors.mlp"
    assert mlp["state"] == "on"
    assert "register_adaptors(registry)" in janus("plugins", "list", "--hooks").stdout


def test_the_plugin_option_works_anywhere_on_the_line(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    assert "mine.py" in janus("--plugin", str(file), "plugins", "list").stdout
    result = janus("plugins", "show", "twice", f"--plugin={file}")
    assert result.returncode == 0, result.stderr
    assert "how often" in result.stdout
    assert "mine.py" in janus("plugins", "list", JANUS_PLUGIN_FILES=str(file)).stdout


def test_user_errors_are_printed_without_a_traceback():
    done = janus("plugins", "show", "adaptors:mpl")
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[0] == "no component is called 'adaptors:mpl'. Did you mean 'adaptors:mlp'?"
    )
    assert "Traceback" not in done.stderr
    for command in ("show", "check", "doctor"):
        assert "is loaded by --plugin mine.py, beside the NAME" in janus("plugins", command, "mine.py").stderr
    assert "Traceback" in janus("plugins", "show", "mpl", "--traceback").stderr


@pytest.mark.parametrize("name", ["out.xyz", "out"])
def test_draw_checks_the_extension_before_loading_the_model(tmp_path: Path, name: str):
    done = janus("draw", "no-such-model", "a cat", "-o", str(tmp_path / name))
    assert done.returncode == 2
    assert "name a .png or a .jpg" in done.stderr


def test_a_missing_extra_prints_the_pip_line():
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from janus_modular.cli.app import app\napp(['config', 'validate', 'tiny'])"
    )
    done = janus(python=("-c", code))
    assert done.returncode == 2
    assert "pip install 'janus-modular[torch]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_validate_lists_every_error_and_diff_shows_changes():
    done = janus(
        "config", "validate", "tiny", "understanding.encoder.layesr=3", "generation.tokenizer=x", "a=1"
    )
    assert done.returncode == 2
    assert "3 errors" in done.stderr
    for expected in (
        "Did you mean 'layers'?",
        "generation.tokenizer.name: no image tokenizer is called 'x'",
        "a: unknown key",
    ):
        assert expected in done.stderr
    valid = janus("config", "validate", "tiny", "image_sampler=autoregressive").stdout
    assert "  backbone: hf\n  text_sampler: text\n  image_sampler: autoregressive\n" in valid
    changed = janus("config", "diff", "tiny", "generation.width=64").stdout
    assert changed == "  generation.width: 32 -> 64\n"
    assert "stem: [8, 16, 32]" in janus("config", "show", "tiny").stdout


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\n1 / 0\n", "broken.py (line 2) failed to load: ZeroDivisionError"),
        ("import threading; threading.Event().wait()", "it took longer than 2 s"),
        ("import os; os._exit(7)", "its process ended with code 7"),
    ],
)
def test_doctor_reports_a_plugin_file_that_is_broken(tmp_path: Path, source: str, expected: str):
    broken, mine = tmp_path / "broken.py", tmp_path / "mine.py"
    broken.write_text(source)
    mine.write_text(PLUGIN)
    limit = ("--timeout", "2") if "wait" in source else ()
    files = (f"--plugin={mine}", f"--plugin={broken}")  # reported last: what does not load
    done = janus("plugins", "doctor", "--json", *limit, *files, JANUS_DISABLE_PLUGINS="janus-modular")
    *works, fails = json.loads(done.stdout)
    assert done.returncode == 1
    if not limit:  # a machine may be too busy to load it in 2 s
        assert [(one["name"], one["message"], one["output"]) for one in works] == [
            ("twice", "", "hello from the plugin")
        ]
    assert expected in fails["message"]
    assert "broken.py" in fails["plugin"]


def test_other_commands_stop_at_a_plugin_file_that_is_broken(tmp_path: Path):
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\n\n1 / 0\n")
    for line in (("plugins", "list"), ("config", "validate", "tiny"), ("plugins", "show", "mlp")):
        done = janus(*line, f"--plugin={broken}")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{broken} (line 3) failed to load: ZeroDivisionError" in done.stderr


def test_env_prints_the_facts_of_a_bug_report():
    facts = json.loads(janus("env", "--json", JANUS_DISABLE_PLUGINS="mlp").stdout)
    assert {"versions", "extras", "devices", "components", "plugins", "settings"} == set(facts)
    assert facts["settings"]["JANUS_DISABLE_PLUGINS"] == "mlp"
    assert facts["plugins"]["disabled"] == ["mlp"]


def test_doctor_passes_working_plugins_and_separates_their_output(tmp_path: Path):
    others = only(tmp_path, "acme", PLUGIN)
    done = janus("plugins", "doctor", "--json", JANUS_DISABLE_PLUGINS=others, PYTHONPATH=str(tmp_path))
    (report,) = json.loads(done.stdout)
    assert done.returncode == 0
    assert (report["message"], report["registers"], report["output"]) == (
        "",
        ["twice"],
        "hello from the plugin",
    )


def test_a_missing_extra_is_not_a_broken_plugin(tmp_path: Path):
    source = "raise ModuleNotFoundError('No module named torch', name='torch')"
    others = only(tmp_path, "acme", source)
    line = ("plugins", "doctor")
    done = janus(*line, JANUS_DISABLE_PLUGINS=others, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "lacks an extra" in done.stdout
    assert "pip install 'janus-modular[torch]'" in done.stdout


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os; os._exit(7)", "its process ended with code 7"),
        ("import threading; threading.Event().wait()", "it took longer than"),
        (PLUGIN.replace('"twice"', '"thrice"'), "registers thrice"),
        (PLUGIN + "raise OSError('no disk')", "OSError: no disk"),
        (PLUGIN.replace("register_adaptors", "register_adaptor"), "Did you mean 'register_adaptors'?"),
        (PLUGIN + "    registry.add('extra', object, TwiceConfig)\n", "registers 'extra' too"),
    ],
)
def test_doctor_finds_broken_plugins(tmp_path: Path, source: str, expected: str):
    others = only(tmp_path, "acme", source)
    limit = ("--timeout", "2") if "wait" in source else ()
    done = janus(
        "plugins", "doctor", *limit, JANUS_DISABLE_PLUGINS=f"{others},nobody", PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 1
    assert expected in done.stdout
    assert "broken" in done.stdout
    assert "names 'nobody'" in done.stderr


@pytest.mark.parametrize("words", [["--layout", "native"], ["--layout=native"]])
def test_an_option_of_the_previous_version_is_an_error_with_its_new_name(words: list[str]) -> None:
    done = CliRunner().invoke(app, ["convert", "a", "b", *words])
    assert done.exit_code == 2
    assert "--layout is called --format now" in done.output
