"""The compact vision transformer against torch's own layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from janus_modular import PixelSpec
from janus_plugins.understanding_encoders.vit import Block, Vit, VitConfig


def make(**options: object) -> Vit:
    torch.manual_seed(0)
    small = {
        "feature_dim": 16,
        "layers": 2,
        "heads": 2,
        "stem": [8, 8],
        "pixels": PixelSpec(height=16, width=16),
    }
    return Vit(VitConfig(**{**small, **options}))


def test_block_is_torchs_own_pre_norm_layer() -> None:
    torch.manual_seed(0)
    ours = Block(16, 4).eval()
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        theirs.self_attn.out_proj: ours.proj,
        theirs.linear1: ours.mlp[0],
        theirs.linear2: ours.mlp[2],
        theirs.norm1: ours.norm1,
        theirs.norm2: ours.norm2,
    }
    for module, source in pairs.items():
        module.load_state_dict(source.state_dict())
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(ours.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(ours.qkv.bias)
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs.train()(x))


@pytest.mark.parametrize(("height", "width", "tokens"), [(16, 16, 16), (8, 24, 12), (32, 32, 64)])
def test_any_size_that_divides(height: int, width: int, tokens: int) -> None:
    vit = make()
    assert math.prod(vit.grid(height, width)) == tokens
    assert vit(torch.rand(3, 3, height, width)).shape == (3, tokens, 16)


def test_larger_images_keep_where_things_are() -> None:
    """Positions are stretched with the grid: doubled constant positions stay what they are."""
    vit = make(layers=1).eval()
    with torch.no_grad():
        vit.positions.fill_(0.5)
        flat = torch.zeros(1, 3, 32, 32)
        inner = vit(flat)[0].view(8, 8, 16)[2:-2, 2:-2]
    torch.testing.assert_close(inner, inner[:1, :1].expand_as(inner))


def test_half_precision() -> None:
    vit = make().eval()
    pixels = torch.rand(2, 3, 32, 16)
    # bfloat16 keeps 8 bits, features are of size 1
    torch.testing.assert_close(
        vit.bfloat16()(pixels.bfloat16()).float(), vit.float()(pixels), atol=0.1, rtol=0.1
    )


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="18x16 does not divide by its factor 4"):
        make().grid(18, 16)
    with pytest.raises(ValueError, match="16 features do not divide by 3 heads"):
        make(heads=3)
