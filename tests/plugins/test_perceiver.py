"""``perceiver``, against Idefics2's connector in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Idefics2Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from janus_modular import CheckpointError
from janus_modular.interfaces import ComponentSpec
from janus_modular.weights.pretrained import load_pretrained
from janus_plugins.adaptors.perceiver import PerceiverAdaptor, PerceiverConfig

C, D = 6, 12
SMALL = {"queries": 3, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 5}


def connector(c: int, d: int, intermediate: int, **sizes: int) -> Any:
    """transformers' connector of Idefics2, by this component's options."""
    return Idefics2Connector(
        Idefics2Config(
            vision_config={"hidden_size": c, "num_attention_heads": 2},
            text_config={"model_type": "mistral", "hidden_size": d, "intermediate_size": intermediate},
            perceiver_config={
                "hidden_size": d,
                "resampler_n_latents": sizes["queries"],
                "resampler_depth": sizes["layers"],
                "resampler_n_heads": sizes["heads"],
                "num_key_value_heads": sizes["kv_heads"],
                "resampler_head_dim": sizes["head_dim"],
            },
        )
    )


def read(weights: dict[str, torch.Tensor], folder: Path) -> tuple[PerceiverAdaptor, Any]:
    save_file(weights, folder / "model.safetensors")
    config = PerceiverConfig(**SMALL, intermediate=20, pretrained=str(folder))
    adaptor = PerceiverAdaptor(config, C, D)
    return adaptor, load_pretrained(adaptor, ComponentSpec("adaptors", "perceiver", config))


@torch.no_grad()
def test_it_reads_idefics2_and_computes_what_transformers_does(tmp_path: Path):
    torch.manual_seed(0)
    theirs = connector(C, D, 20, **SMALL)
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.5)  # norms of one and queries that are all alike prove little
    weights = {f"model.connector.{name}": x for name, x in theirs.state_dict().items()}
    weights["model.text_model.norm.weight"] = torch.ones(3)
    features = torch.randn(2, 7, C)

    adaptor, report = read(weights, tmp_path)

    assert report.loaded == len(adaptor.state_dict()) == len(theirs.state_dict())
    assert report.unexpected_keys == ["model.text_model.norm.weight"]
    wanted = theirs(features, attention_mask=torch.ones(2, 7, dtype=torch.long))
    torch.testing.assert_close(adaptor(features, (1, 7)), wanted)


def test_a_weight_that_is_missing_is_named(tmp_path: Path):
    weights = connector(C, D, 20, **SMALL).state_dict()
    del weights["perceiver_resampler.latents"]
    with pytest.raises(CheckpointError, match=r"perceiver_resampler\.latents"):
        read({f"connector.{name}": x for name, x in weights.items()}, tmp_path)


def test_the_published_sizes_are_those_of_transformers():
    with torch.device("meta"):
        ours = PerceiverAdaptor(PerceiverConfig(intermediate=14336), 1152, 4096)
        theirs = connector(1152, 4096, 14336, queries=64, layers=3, heads=16, kv_heads=4, head_dim=96)
    shapes = {name: tuple(x.shape) for name, x in theirs.state_dict().items()}
    assert {name: tuple(x.shape) for name, x in ours.state_dict().items()} == shapes


@torch.no_grad()
def test_any_grid_becomes_as_many_tokens_as_there_are_queries_each_seeing_all_of_it():
    torch.manual_seed(0)
    adaptor = PerceiverAdaptor(PerceiverConfig(**SMALL), C, D)
    for grid in ((1, 1), (3, 5), (8, 2)):
        features = torch.randn(2, grid[0] * grid[1], C)
        tokens = adaptor(features, grid)
        assert tokens.shape == (2, adaptor.num_tokens(grid), D) == (2, 3, D)
        features[:, -1] += 1
        assert (adaptor(features, grid) != tokens).any(-1).all()
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])  # queries start apart, so that they can learn apart


def test_heads_that_do_not_share_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="heads: 16 do not share 3 kv_heads"):
        PerceiverConfig(kv_heads=3)
    with pytest.raises(ValueError, match="queries: 0"):
        PerceiverConfig(queries=0)


def test_a_file_of_more_layers_is_refused(tmp_path: Path):
    weights = connector(C, D, 20, **{**SMALL, "layers": 3}).state_dict()
    with pytest.raises(CheckpointError, match=r"unexpected:\n +perceiver_resampler\.layers\.2\."):
        read({f"model.connector.{name}": x for name, x in weights.items()}, tmp_path)
