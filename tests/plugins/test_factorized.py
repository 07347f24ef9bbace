"""The head for several codes a position: its layers' arithmetic, and that it learns what codes share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from janus_plugins.heads.factorized import Block, FactorizedHead, FactorizedHeadConfig

NAMES = {
    "query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
    "out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
}  # fmt: skip


def make(codebooks: tuple[int, ...] = (4, 6), width: int = 16, **options: int) -> FactorizedHead:
    torch.manual_seed(0)
    config = FactorizedHeadConfig(**{"layers": 2, "heads": 2, "hidden": 24, **options})
    return FactorizedHead(config, width, codebooks)


@torch.no_grad()
def test_a_layer_computes_what_llamas_does_without_positions() -> None:
    torch.manual_seed(0)
    block = Block(16, heads=2, hidden=24)
    nn.init.normal_(block.attention_norm.weight)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, rms_norm_eps=1e-5,
        attn_implementation="eager",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, layer_idx=0)
    for ours, theirs in NAMES.items():
        layer.get_parameter(f"{theirs}.weight").copy_(block.get_parameter(f"{ours}.weight"))
    x = torch.randn(5, 3, 16)
    unturned = torch.ones(5, 3, 8), torch.zeros(5, 3, 8)  # cosines and sines of the angle 0
    causal = torch.full((3, 3), -math.inf).triu(1).expand(5, 1, 3, 3)

    expected = layer(x, position_embeddings=unturned, attention_mask=causal)

    torch.testing.assert_close(block(x), expected)


def test_default_sizes_are_those_of_the_published_l_model() -> None:
    with torch.device("meta"):
        head = FactorizedHead(FactorizedHeadConfig(), 1280, (2**6, 2**12))
    layer = 4 * 1280**2 + 3 * 1280 * 3584 + 2 * 1280  # 3584: 8/3 of 1280, up to a multiple of 256
    assert len(head.blocks) == 3
    assert head.blocks[0].heads == 20
    assert sum(p.numel() for p in head.parameters()) == 3 * layer + 1280 * (1 + 64 + 64 + 4096)


def test_the_second_code_is_predicted_from_the_first() -> None:
    """The second follows from the first, which the hidden state says nothing about."""
    head = make().train()
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    first = torch.arange(4).repeat(8)
    second = (first + 2) % 6
    hidden = torch.ones(len(first), 16)
    for _ in range(60):
        known = first[:, None]
        losses = [
            F.cross_entropy(head(hidden, known[:, :0]), first),
            F.cross_entropy(head(hidden, known), second),
        ]
        optimizer.zero_grad()
        sum(losses, torch.zeros(())).backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(math.log(4), abs=0.05)  # four, equally often: nothing to learn
    assert losses[1].item() < 0.1


@torch.no_grad()
def test_an_earlier_code_matters_to_all_that_follow() -> None:
    head = make((4, 6, 5))
    hidden, before = torch.randn(1, 16), torch.tensor([[1, 2]])
    for place in (0, 1):
        other = before.clone()
        other[0, place] += 1
        assert not torch.equal(head(hidden, before), head(hidden, other))


def test_heads_that_do_not_share_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="16 features do not divide by 3 heads"):
        make(heads=3)
    with pytest.raises(ValueError, match="layers: 0; expected at least 1"):
        make(layers=0)
