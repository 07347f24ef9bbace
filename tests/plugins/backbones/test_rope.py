"""Rotary embeddings that follow a sequence's length: each row has its own, alone, packed or beside others."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from janus_modular.errors import ConfigError
from janus_plugins.backbones.hf import HfBackbone, HfConfig

ORIGINAL = 16
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "pad_token_id": 0,
}
KINDS = {
    "longrope": {
        "model_type": "phi3",
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": ORIGINAL,
            "factor": 4.0,
        },
    },
    "dynamic": {
        "model_type": "llama",
        "max_position_embeddings": ORIGINAL,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}
CLOSE = {"rtol": 0, "atol": 1e-5}  # float32 sums in another order; states are of size 1


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest) -> HfBackbone:
    torch.manual_seed(0)
    built = HfBackbone(HfConfig(config={**SIZES, **KINDS[request.param]})).eval()
    for weight in built.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return built


@torch.no_grad()
def test_a_row_does_not_change_with_its_neighbours(backbone: HfBackbone) -> None:
    """A short row beside one that is longer than the original length, then steps of both."""
    x = torch.randn(2, 30, 16)
    lengths = torch.tensor([5, 30])

    def run(rows: list[int], total: int) -> torch.Tensor:
        positions = torch.arange(total).repeat(len(rows), 1)
        for k, row in enumerate(rows):  # padding counts from 0, as in batches
            positions[k, lengths[row] :] = torch.arange(max(total - int(lengths[row]), 0))
        cache = backbone.new_cache(len(rows), 40)
        hidden = backbone(x[rows, :total], positions=positions, cache=cache)
        states = [hidden[torch.arange(len(rows)), lengths[rows] - 1]]
        cache.advance(lengths[rows])
        for step in range(3):
            at = (lengths[rows] + step)[:, None]
            states.append(backbone(x[rows, step : step + 1], positions=at, cache=cache)[:, 0])
            cache.advance(torch.ones(len(rows), dtype=torch.int64))
        return torch.stack(states, dim=1)

    together = run([0, 1], 30)
    torch.testing.assert_close(together[1:], run([1], 30), **CLOSE)
    torch.testing.assert_close(together[:1], run([0], 5), **CLOSE)


@torch.no_grad()
def test_a_sequence_is_what_transformers_makes_of_it_alone(backbone: HfBackbone) -> None:
    theirs = AutoModelForCausalLM.from_config(backbone.model.config).eval()
    theirs.load_state_dict(backbone.model.state_dict())
    x = torch.randn(1, 35, 16)
    packed = torch.cat([torch.arange(30), torch.arange(5)])[None]
    hidden = backbone(x, positions=packed)
    for stretch in (slice(0, 30), slice(30, 35)):
        expected = theirs.model(inputs_embeds=x[:, stretch])[0]
        torch.testing.assert_close(hidden[:, stretch], expected, **CLOSE)


def test_a_graph_of_it_is_refused(backbone: HfBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(ConfigError, match="rope_type dynamic or longrope"):
        backbone(torch.randn(1, 3, 16), positions=torch.arange(3)[None])


@torch.no_grad()
def test_threads_do_not_change_each_others_frequencies(backbone: HfBackbone) -> None:
    """A short and a long sequence in turns, each by two threads that are interrupted often."""
    rotary = backbone.body.rotary_emb
    x = torch.zeros(1, 1, 16)
    positions = [torch.arange(length)[None] for length in (5, 60)] * 2
    alone = [rotary(x, row)[0] for row in positions]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda row: [rotary(x, row)[0] for _ in range(100)], positions))
    finally:
        sys.setswitchinterval(interval)
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(result, expected) for result in results)
