"""Excessive numbers in a config are errors before memory of their size is allocated."""

from __future__ import annotations

from typing import Any

import pytest

from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.config.size_limits import check_numbers
from janus_modular.errors import ConfigError
from janus_modular.model.build import build_model


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"num_hidden_layers": 1001}, "num_hidden_layers"),
        ({"tower": {"depths": [2, 9999]}}, r"tower\.depths\[1\]"),
        ({"n_layer": -5000}, "n_layer"),
        ({"residual_blocks": 10**18}, "residual_blocks"),
        ({"hidden_size": 2**41}, "hidden_size"),
    ],
)
def test_too_many_layers_and_numbers_too_large_are_refused(config: dict[str, Any], path: str):
    with pytest.raises(ConfigError, match=rf"model\.{path}: found .* at most"):
        check_numbers(config, "model")


def test_keys_that_mention_layers_and_count_something_else_are_free():
    check_numbers({"block_ff_dim": 12288, "vocab_size_per_layer_input": 262144, "num_hidden_layers": 1000})


def test_building_stops_at_the_number_of_weights():
    config = resolve(load("tiny", ["backbone.config.num_hidden_layers=5"]), ModelConfig)
    with pytest.raises(ConfigError, match="it has more than 30 weights, the most that are expected"):
        build_model(config, max_tensors=30, on_meta=True)
