"""`GenerationPath.sizes`: any JSON values, stored in the manifest under their own key."""

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
        ({"grids": (1, 2)}, r"its sizes hold {'grids': \(1, 2\)}; expected what JSON can hold"),
        ({"sigma": float("nan"), "codes": 64}, "its sizes hold {'sigma': nan}"),
        ({"codes": {1, 2}}, "its sizes hold {'codes': {1, 2}}"),
        (["codes"], "expected a mapping"),
        ({3: 4}, "expected a mapping from names to values"),
        ({"vocab_size": 64, "hidden_size": 3, "context": 7, "pad_id": 1}, None),
        ({"grids": [1, 2, 4], "sigma": 0.5, "solver": "euler"}, None),
    ],
)
def test_sizes_of_a_path_are_what_json_can_hold(
    tmp_path: Path, plugins: Plugins, sizes: Any, said: str | None
) -> None:
    (tmp_path / "sized.py").write_text(PLUGIN.replace("SIZES", repr(sizes).replace("nan", "float('nan')")))
    plugins.add_file(tmp_path / "sized.py")
    raw = load("tiny", plugins=plugins)
    raw["generation"]["name"] = "sized"
    config = resolve(raw, ModelConfig, plugins)
    if said is None:
        assert build_model(config, plugins).generation.sizes == sizes
        return
    with pytest.raises(ConfigError, match=said):
        build_model(config, plugins)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "replace(graphs[0], outputs=(replace(graphs[0].outputs[1], dtype='float32'),))",
            r"the output 'x' of its graph 'sample_image' is float32 \('rows', 64\); expected model",
        ),
        (
            "replace(graphs[2], outputs=(replace(graphs[2].outputs[0], name='x'),))",
            "the output 'x' of its graph 'decode_image' is uint8",
        ),
        ("replace(graphs[0], role='pick')", "has the role 'pick'; expected one of sample, decode, encode"),
        ("replace(graphs[0], name='embed')", "has a graph called 'embed'; expected lower-case letters"),
    ],
)
def test_declared_graphs_fit_the_sessions_that_run_them(
    tmp_path: Path, plugins: Plugins, change: str, said: str
) -> None:
    graphs = f"""
    def graphs(self):
        from dataclasses import replace
        graphs = super().graphs()
        return [{change}, *graphs[3:]]
"""
    source = PLUGIN.replace("        self.sizes = SIZES\n", graphs)
    (tmp_path / "sized.py").write_text(source)
    plugins.add_file(tmp_path / "sized.py")
    raw = load("tiny", plugins=plugins)
    raw["generation"]["name"] = "sized"
    with pytest.raises(ConfigError, match=said):
        build_model(resolve(raw, ModelConfig, plugins), plugins)


def test_the_form_of_encoded_images_is_an_encoded_spec(tmp_path: Path, plugins: Plugins) -> None:
    (tmp_path / "sized.py").write_text(PLUGIN.replace("self.sizes = SIZES", "self.encoded = (16,)"))
    plugins.add_file(tmp_path / "sized.py")
    raw = load("tiny", plugins=plugins)
    raw["generation"]["name"] = "sized"
    with pytest.raises(ConfigError, match=r"its encoded is \(16,\); expected a janus_modular.EncodedSpec"):
        build_model(resolve(raw, ModelConfig, plugins), plugins)
