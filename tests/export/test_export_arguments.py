"""What cannot be exported or verified, because of what was passed or how the path draws, is said in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from janus_export.config import ExportConfig
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import ConfigError, PromptError
from janus_modular.cli.app import app
from janus_modular.config import load, resolve


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((3, "bundle"), "source: found 3"),
        (("model", None), "target: found None"),
        (("model", "bundle", {"variants": ["fp32"]}), "config: found {'variants'.*an ExportConfig"),
        (("model", "bundle", "portable"), "config: found 'portable'"),
    ],
)
def test_export_names_an_argument_of_another_type(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        export(*arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folder": 3}, "folder: found 3"),
        ({"against": None}, "against: found None"),
        ({"variants": "fp32"}, "variants: found 'fp32'; expected a list of texts"),
        ({"gates": "sizes"}, "gates: found 'sizes'"),
        ({"gates": [1]}, "gates: found 1 among the texts"),
    ],
)
def test_verify_names_an_argument_of_another_type(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, PromptError), match=said):
        verify(**{"folder": tmp_path, "against": tmp_path, **options})


@pytest.mark.parametrize(
    "line",
    [
        ["variants=[]", "--precision", "cpu-int4"],
        ["variants=[fp16]", "--precision", "fp32"],
        ["only=[text]", "--only", "drawing"],
        ["max_file_size=2GB", "--max-file-size", "1GB"],
    ],
)
def test_an_option_and_an_override_of_the_same_setting_are_refused(tmp_path: Path, line: list[str]):
    done = CliRunner().invoke(app, ["export", "model", str(tmp_path / "bundle"), *line])
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert f"found both {line[1]} and {line[0]}; expected one of them" in said


@pytest.mark.parametrize("change", ["context=8", "widths=[2048]", "opset=25"])
def test_what_follows_from_the_model_is_no_setting(change: str):
    with pytest.raises(ConfigError, match=f"{change.partition('=')[0]}"):
        resolve(load("export/portable", [change]), ExportConfig)
