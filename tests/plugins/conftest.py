"""The reference fixture, as tests of components need it: its arrays, its weights, its image."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"


@pytest.fixture(scope="session")
def expected() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def reference_weights() -> Callable[[str], dict[str, Tensor]]:
    """Make the published checkpoint's tensors whose names begin with a prefix."""
    spec = spec_from_file_location("deterministic_weights", REFERENCE / "deterministic_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = json.loads((REFERENCE / "keys.json").read_text())

    def weights(prefix: str) -> dict[str, Tensor]:
        names = [name for name in shapes if name.startswith(prefix)]
        return {name: torch.from_numpy(module.tensor_for(name, tuple(shapes[name]))) for name in names}

    return weights


@pytest.fixture(scope="session")
def astronaut() -> Tensor:
    """The image of the fixture as 384 x 384 pixels (1, 3, H, W) in [-1, 1] ; it is square."""
    image = (
        Image.open(REFERENCE / "astronaut.png").convert("RGB").resize((384, 384), Image.Resampling.BICUBIC)
    )
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1


def taming_names(levels: int, blocks: int, attention: bool) -> set[str]:
    """List a VQGAN's weights as taming-transformers names them; each level is wider than the one above."""
    layers = {"quant_conv", "post_quant_conv"}
    residual = ("norm1", "conv1", "norm2", "conv2")
    attended = ("norm", "q", "k", "v", "proj_out")
    for half, way, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        layers |= {f"{half}.{one}" for one in ("conv_in", "norm_out", "conv_out")}
        layers |= {f"{half}.mid.block_{i}.{one}" for i in (1, 2) for one in residual}
        layers |= {f"{half}.mid.attn_1.{one}" for one in attended}
        for level in range(levels):  # of both halves, the highest resolution first
            here, first, last = f"{half}.{way}.{level}", level == 0, level == levels - 1
            layers |= {f"{here}.block.{i}.{one}" for i in range(count) for one in residual}
            if last and attention:
                layers |= {f"{here}.attn.{i}.{one}" for i in range(count) for one in attended}
            if not (last if way == "down" else first):
                layers.add(f"{here}.{way}sample.conv")
            if not (first if way == "down" else last):  # it comes from a level of another width
                layers.add(f"{here}.block.0.nin_shortcut")
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {
        "quantize.embedding.weight"
    }


@pytest.fixture(scope="session")
def taming_weights() -> Callable[..., dict[str, Tensor]]:
    """Name a convolutional tokenizer's weights as taming-transformers would save them."""

    def weights(tokenizer: Any, attention: bool = True) -> dict[str, Tensor]:
        levels = len(tokenizer.config.channel_multipliers)
        state = tokenizer.state_dict()
        renamed = {}
        for name in taming_names(levels, tokenizer.config.residual_blocks, attention):
            parts = name.split(".")
            if parts[1] in ("down", "up"):
                level = int(parts[2]) if parts[1] == "down" else levels - 1 - int(parts[2])
                parts[1:4] = ["conv_blocks", str(level), "res" if parts[3] == "block" else parts[3]]
            elif parts[1] == "mid":
                parts[2] = str(("block_1", "attn_1", "block_2").index(parts[2]))
            renamed[name] = state.pop(".".join(parts))
        assert state == {}  # nothing of ours has no published name
        return renamed

    return weights


@pytest.fixture(scope="session")
def taught() -> Callable[..., list[float]]:
    """Train a tokenizer on its own losses, to paint a ramp; return the loss "pixels" of each step."""

    def history(tokenizer: Any, *, steps: int = 12, lr: float = 1e-2, rows: int = 1) -> list[float]:
        tokenizer.train()
        optimizer = torch.optim.Adam(tokenizer.parameters(), lr=lr)
        pixels = (torch.arange(16.0) / 8 - 1).expand(rows, 3, 16, 16)
        told = []
        for _ in range(steps):
            losses = tokenizer.losses(pixels)
            told.append(losses["pixels"].item())
            optimizer.zero_grad()
            sum(losses.values(), torch.zeros(())).backward()
            optimizer.step()
        return told

    return history
