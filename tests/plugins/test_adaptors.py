"""Adaptors and the image head: weight names, dimensions and results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from janus_modular import ConfigError
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.model.build import build_model
from janus_modular.plugins import Plugins
from janus_plugins.adaptors.hybrid import HybridAdaptor, HybridConfig
from janus_plugins.adaptors.identity import IdentityAdaptor, IdentityConfig
from janus_plugins.adaptors.mlp import MlpAdaptor, MlpConfig
from janus_plugins.heads.mlp import MlpHead, MlpHeadConfig


@pytest.mark.parametrize("name", ["identity", "linear", "mlp", "hybrid"])
def test_every_adaptor_carries_features_to_the_width_it_was_given(plugins: Plugins, name: str) -> None:
    entry = plugins.entry("adaptors", name)
    adaptor = entry.factory(entry.config(), 12, 12 if name == "identity" else 20)

    carried = adaptor(torch.randn(2, 6, 12), (2, 3))

    assert carried.shape == (2, adaptor.num_tokens((2, 3)), 12 if name == "identity" else 20)


def test_identity_refuses_unequal_widths_and_names_both() -> None:
    with pytest.raises(ConfigError, match=r"1024.*2048"):
        IdentityAdaptor(IdentityConfig(), 1024, 2048)


def test_mlp_has_the_published_keys_and_arithmetic() -> None:
    adaptor = MlpAdaptor(MlpConfig(depth=3), 6, 10)
    state = adaptor.state_dict()
    features = torch.randn(2, 5, 6)

    assert list(state) == [f"layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    x = F.linear(features, state["layers.0.weight"], state["layers.0.bias"])
    for i in (2, 4):
        x = F.linear(F.gelu(x), state[f"layers.{i}.weight"], state[f"layers.{i}.bias"])
    torch.testing.assert_close(adaptor(features, (1, 5)), x)


def test_hybrid_puts_the_high_map_first() -> None:
    adaptor = HybridAdaptor(HybridConfig(depth=1), 8, 6)
    features = torch.cat([torch.randn(1, 3, 4), torch.zeros(1, 3, 4)], dim=-1)  # high, then low

    carried = adaptor(features, (1, 3))

    torch.testing.assert_close(carried[..., :3], adaptor.high_up_proj(features[..., :4]))
    torch.testing.assert_close(carried[..., 3:], adaptor.low_up_proj.bias.expand(1, 3, 3))


def test_hybrid_has_the_published_keys_and_needs_even_widths() -> None:
    names = {name.rsplit(".", 1)[0] for name in HybridAdaptor(HybridConfig(depth=3), 8, 6).state_dict()}

    assert names == {"high_up_proj", "low_up_proj", "layers.1", "layers.3"}
    with pytest.raises(ConfigError, match="even, not 9 and 6"):
        HybridAdaptor(HybridConfig(), 9, 6)


@pytest.mark.parametrize(("config", "width"), [(MlpConfig(depth=0), 4), (HybridConfig(depth=0), 4)])
def test_a_depth_of_nothing_is_refused(config: MlpConfig | HybridConfig, width: int) -> None:
    build = MlpAdaptor if isinstance(config, MlpConfig) else HybridAdaptor
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        build(config, width, width)  # type: ignore[arg-type]


def test_published_sizes_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        modules = {
            6_295_552: MlpAdaptor(MlpConfig(), 1024, 2048),  # 6.296 M
            20_979_712: MlpAdaptor(MlpConfig(), 1024, 4096),  # 20.980 M
            4_214_784: MlpAdaptor(MlpConfig(), 8, 2048),  # 4.215 M
            16_818_176: MlpAdaptor(MlpConfig(), 8, 4096),  # 16.818 M
            37_767_168: MlpHead(MlpHeadConfig(), 2048, (16384,)),  # 37.767 M
            83_906_560: MlpHead(MlpHeadConfig(), 4096, (16384,)),  # 83.907 M
        }
    for count, module in modules.items():
        assert sum(weight.numel() for weight in module.parameters()) == count


def test_the_head_has_the_published_keys_and_takes_any_leading_shape() -> None:
    head = MlpHead(MlpHeadConfig(hidden=5), 4, (9,))

    assert {name.rsplit(".", 1)[0] for name in head.state_dict()} == {"output_mlp_projector", "vision_head"}
    assert head(torch.randn(4), torch.empty(0)).shape == (9,)
    assert head(torch.randn(2, 3, 4), torch.empty(2, 3, 0)).shape == (2, 3, 9)


def test_a_head_for_one_code_refuses_several() -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has 2, of \(64, 4096\)"):
        MlpHead(MlpHeadConfig(), 4, (64, 4096))


@pytest.mark.parametrize(
    ("adaptor", "found"),
    [
        ("pixel-unshuffle", "'pixel-unshuffle' makes 4 positions of 4x4 codes"),
        ("ldp", "'ldp' makes 4 positions of 4x4 codes"),
        ("perceiver", "'perceiver' makes 64 positions of 4x4 codes"),
        ("{name: perceiver, queries: 16}", "'perceiver' makes 16 positions of 1x1 codes"),  # right by chance
    ],
)
def test_drawing_refuses_an_adaptor_that_does_not_leave_each_code_its_position(adaptor: str, found: str):
    config = resolve(load("tiny", [f"generation.adaptor={adaptor}"]), ModelConfig)
    with pytest.raises(ConfigError, match=rf"{found}, and each code has to keep its own"):
        build_model(config)


POSITIONS = """
from dataclasses import dataclass
import torch
from torch import nn
from janus_modular import ComponentConfig, hookimpl

@dataclass
class PositionsConfig(ComponentConfig):
    pass

class Positions(nn.Module):
    def __init__(self, config, feature_dim, hidden_size):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(feature_dim, hidden_size)
        self.positions = nn.Parameter(torch.SCALE(16, hidden_size))

    def num_tokens(self, grid):
        return grid[0] * grid[1]

    def forward(self, features, grid):
        return self.linear(features) + self.positions[: grid[0] * grid[1]]

@hookimpl
def register_adaptors(registry):
    registry.add("positions", Positions, PositionsConfig)
"""


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("initial", ["zeros", "randn"])
def test_drawing_refuses_an_adaptor_that_uses_positions_of_codes(
    plugins: Plugins, tmp_path: Path, initial: str, on_meta: bool
) -> None:
    """It would add every position's embedding in training, and that of the first position in sampling."""
    (tmp_path / "positions.py").write_text(POSITIONS.replace("SCALE", initial))
    plugins.add_file(tmp_path / "positions.py")
    config = resolve(load("tiny", ["generation.adaptor=positions"], plugins), ModelConfig, plugins)
    with pytest.raises(
        ConfigError, match="'positions' gives another embedding for a code in the 4x4 grid than"
    ):
        build_model(config, plugins, on_meta=on_meta)
