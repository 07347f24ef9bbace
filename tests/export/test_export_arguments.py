"""Errors of arguments of `export` and `verify`, and of generation paths that cannot be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from janus_export.config import ExportConfig
from janus_export.errors import ExportError
from janus_export.onnx_export.export import export
from janus_export.verify import verify
from janus_modular import ConfigError, PromptError
from janus_modular.checkpoints import ModelAssembly, convert, save
from janus_modular.cli.app import app
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.plugins import default_plugins
from janus_modular.samplers import unusable_samplers


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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("text_sampler=nope", "chat: no text sampler is called 'nope'"),
        ("image_sampler=text", "draw: no image sampler is called 'text'"),
    ],
)
def test_a_checkpoint_whose_sampler_is_unknown_is_not_exported(
    tmp_path: Path, override: str, said: str
) -> None:
    """And the suggested command makes one that is."""
    source, target = tmp_path / "model", tmp_path / "bundle"
    save(ModelAssembly.from_config(resolve(load("tiny", [override]), ModelConfig)), source)
    with pytest.raises(ExportError, match=said) as error:
        export(source, target)
    assert not target.exists()
    assert f"convert {source} FOLDER text_sampler=... image_sampler=..." in str(error.value)
    convert(source, tmp_path / "mended", overrides=["text_sampler=text", "image_sampler=autoregressive"])
    assert not unusable_samplers(ModelAssembly.from_checkpoint(tmp_path / "mended").model, default_plugins())


def test_long_names_of_dtypes_are_the_short_ones():
    assert ExportConfig(variants=["float32", "bfloat16", "cpu-int4"]).variants == ["fp32", "bf16", "cpu-int4"]
    with pytest.raises(ExportError, match="'fp16' is named 2 times"):
        ExportConfig(variants=["float16", "fp16"])
