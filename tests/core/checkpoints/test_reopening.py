"""Every written checkpoint can be opened, and values derived from a config follow its changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from janus_modular.checkpoints import ModelAssembly, save
from janus_modular.checkpoints.native import check_rebuilds
from janus_modular.cli.app import app
from janus_modular.errors import CheckpointError

Made = ModelAssembly


def four_bits(model: Any) -> str:
    """Put what quantisers leave of a weight in its place: packed integers."""
    layer = model.backbone.model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(64 * 16, 1, dtype=torch.uint8), requires_grad=False)
    return "up_proj.weight: found torch.uint8, expected torch.float32"


def one_more(model: Any) -> str:
    model.understanding.adaptor.scale = nn.Parameter(torch.zeros(1))
    return "1 unexpected in understanding.adaptor:\n    understanding.adaptor.scale"


def another_shape(model: Any) -> str:
    model.backbone.model.lm_head.weight = nn.Parameter(torch.zeros(300, 32))
    return "lm_head.weight: found (300, 32), expected (320, 32)"


def untied(model: Any) -> str:
    """Leave the config with a tie that the weights do not have."""
    model.backbone.config.config["tie_word_embeddings"] = True
    return "1 unexpected in backbone:\n    backbone.model.lm_head.weight"


def complex_numbers(model: Any) -> str:
    model.understanding.adaptor.register_buffer("phase", torch.zeros(1, dtype=torch.complex64))
    return "torch.complex64 cannot be stored"


@pytest.mark.parametrize("spoil", [four_bits, one_more, another_shape, untied, complex_numbers])
def test_a_model_whose_config_builds_another_is_not_saved(
    spoil: Callable[[Any], str], make: Callable[..., Made], tmp_path: Path
) -> None:
    assembly = make()
    check_rebuilds(assembly)
    expected = spoil(assembly.model)
    with pytest.raises(CheckpointError, match="cannot be opened again, so nothing is written") as error:
        save(assembly, tmp_path / "model")
    assert expected in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_no_file_can_hold_is_refused(make: Callable[..., Made]) -> None:
    assembly: Any = make()
    assembly.model.backbone.config.config["dtype"] = torch.float32
    with pytest.raises(CheckpointError, match="a config that builds no model: Object of type dtype"):
        check_rebuilds(assembly)


def converted(source: Path, target: Path, *words: str) -> ModelAssembly:
    result = CliRunner().invoke(app, ["convert", str(source), str(target), *words])
    assert result.exit_code == 0, result.output
    return ModelAssembly.from_checkpoint(target)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generation.height=64"], {"drawing": {"height": 64, "width": 32, "num_tokens": 32}}),
        (["understanding.encoder.pixels.height=64"], {"image_tokens": 32}),
        (["backbone.config.max_position_embeddings=128"], {"context": 128}),
    ],
)
def test_a_converted_processor_follows_the_config(
    words: list[str], expected: dict[str, Any], make: Callable[..., Made], tmp_path: Path
) -> None:
    save(make(), tmp_path / "model")
    assembly = converted(tmp_path / "model", tmp_path / "new", *words)
    model, processor = assembly.model, assembly.processor
    written = json.loads((tmp_path / "new" / "processor.json").read_text())
    assert {key: written[key] for key in expected} == expected
    assert processor.to_dict() == written
    assert processor.drawing is not None
    assert processor.drawing.num_tokens == model.generation.num_tokens
    assert processor.image_tokens == model.understanding.num_tokens


def test_a_processor_of_another_model_is_refused(make: Callable[..., Made], tmp_path: Path) -> None:
    save(make(), tmp_path)
    file = tmp_path / "processor.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({**written, "image_tokens": 576}))
    with pytest.raises(CheckpointError, match=r"processor.json: image_tokens is 576; expected 16"):
        ModelAssembly.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("description", "method"), [({"load_in_4bit": True}, "bitsandbytes"), ({}, "a method that is not named")]
)
def test_a_quantised_checkpoint_is_refused(
    description: dict[str, Any], method: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    save(make(), tmp_path)
    file = tmp_path / "config.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "quantization_config": description}))
    with pytest.raises(CheckpointError, match=f"quantised by {method}"):
        ModelAssembly.from_checkpoint(tmp_path)
