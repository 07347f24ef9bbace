"""Components that do not fit their slot: the error has config path, component, file and reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError
from janus_modular.model.build import build_model
from janus_modular.model.interface_errors import interface_errors
from janus_modular.plugins import Plugins

PLUGIN = """
from dataclasses import dataclass
import torch
from janus_modular import ComponentConfig, hookimpl

@dataclass
class OddConfig(ComponentConfig):
    '''Options.'''

class Odd(torch.nn.Module):
    '''An adaptor.'''

    def __init__(self, config, input_dim, output_dim):
        super().__init__()
        self.layer = torch.nn.Linear(input_dim, output_dim)

    def num_tokens(self, grid):
        return grid[0] * grid[1]

    def forward(self, features, grid):
        return self.layer(features)

@hookimpl
def register_adaptors(registry):
    registry.add("odd", Odd, OddConfig)
"""


def build(folder: Path, source: str, plugins: Plugins) -> None:
    file = folder / "odd_plugin.py"
    file.write_text(source)
    plugins.add_file(file)
    build_model(
        resolve(load("tiny", ["understanding.adaptor=odd"], plugins), ModelConfig, plugins),
        plugins,
        on_meta=True,
    )


def test_a_member_with_its_old_name_is_named_with_the_new_one() -> None:
    class Encoder(torch.nn.Module):
        width, pixels, grid = 4, None, None

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels

    errors = interface_errors(Encoder(), "understanding_encoders")
    assert "it lacks feature_dim" in errors
    assert "Its 'width' is called 'feature_dim' now." in errors


def test_one_that_fits_is_built(tmp_path: Path, plugins: Plugins) -> None:
    build(tmp_path, PLUGIN, plugins)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("self, config, input_dim, output_dim", "self", r"TypeError: .*factory\(config, input_dim"),
        ("def num_tokens", "def num_token", "it lacks num_tokens .*Did you mean 'num_token'"),
        ("def forward", "def backward", r"it lacks forward \(see Adaptor in interfaces.py"),
        ('"odd", Odd,', '"odd", lambda *_: None,', "it is built as None; expected a torch.nn.Module"),
        ("self.layer = ", "self.layer = [][0] or ", "IndexError: list index out of range"),
        ("super().__init__()", "raise ValueError('too odd')", "cannot be built: too odd"),
        (
            "def forward(self, features, grid)",
            "def forward(self, features)",
            r"its forward takes \(features\); expected forward\(features, grid\) .see Adaptor in",
        ),
        (
            "def num_tokens(self, grid):",
            "num_tokens = 3\n    def other(self, grid):",
            "its num_tokens is no method",
        ),
    ],
)
def test_one_that_does_not_fit_is_named(
    tmp_path: Path, plugins: Plugins, old: str, new: str, said: str
) -> None:
    assert old in PLUGIN
    with pytest.raises(ConfigError, match=said) as caught:
        build(tmp_path, PLUGIN.replace(old, new), plugins)
    assert [fault.path for fault in caught.value.errors] == ["understanding.adaptor"]
    assert "the adaptor 'odd' of" in str(caught.value)
    assert "odd_plugin.py" in str(caught.value)
