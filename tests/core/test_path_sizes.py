"""The sizes of a generation path have names of their own: none hides what a session or a manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from janus_modular import ConfigError
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.build import build_model
from janus_modular.plugins import Plugins

PLUGIN = """
from janus_modular import hookimpl
from janus_plugins.generation.autoregressive import AutoregressiveConfig, AutoregressiveGeneration

class Sized(AutoregressiveGeneration):
    def __init__(self, *args):
        super().__init__(*args)
        self.sizes = SIZES

@hookimpl
def register_generation(registry):
    registry.add("sized", Sized.build, AutoregressiveConfig)
"""


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"codes": 64, "drawing": 9}, "sizes say drawing, which a session says itself"),
        ({"codes": 64, "pad": 1, "vocab": 2}, "sizes say vocab, pad"),
        ({"codes": 64.0}, r"must be whole numbers, and these are not: {'codes': 64.0}"),
        ({"codes": True}, "must be whole numbers"),
        (["codes"], "expected a mapping"),
        ({"codes": 64, "width": 3, "context": 7}, None),
    ],
)
def test_sizes_that_a_session_says_itself_are_refused(
    tmp_path: Path, plugins: Plugins, sizes: Any, said: str | None
) -> None:
    (tmp_path / "sized.py").write_text(PLUGIN.replace("SIZES", repr(sizes)))
    plugins.add_file(tmp_path / "sized.py")
    raw = load("tiny", plugins=plugins)
    raw["generation"]["name"] = "sized"
    config = resolve(raw, ModelConfig, plugins)
    if said is None:
        assert build_model(config, plugins).generation.sizes == sizes
        return
    with pytest.raises(ConfigError, match=said):
        build_model(config, plugins)
