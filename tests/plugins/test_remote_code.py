"""A folder with remote code is an error; the code is neither run nor offered to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from janus_modular.errors import CheckpointError
from janus_plugins.backbones.decoder_config import decoder_config
from janus_plugins.backbones.hf import HfConfig
from janus_plugins.understanding_encoders.hf_vision import HfVisionConfig, vision_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config: dict[str, Any] = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    return tmp_path


def test_a_decoder_with_code_of_its_own(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no config of a decoder"):
        decoder_config(HfConfig(pretrained=str(folder)))
    assert not (folder / "ran").exists()


def test_a_vision_model_with_code_of_its_own(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="contains custom code"):
        vision_config(HfVisionConfig(pretrained=str(folder)), folder)
    assert not (folder / "ran").exists()
