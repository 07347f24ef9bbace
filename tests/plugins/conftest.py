"""The reference fixture, as tests of components need it: its arrays, its weights, its picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

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
    """The picture of the fixture as 384 x 384 pixels (1, 3, H, W) in [-1, 1] ; it is square."""
    picture = (
        Image.open(REFERENCE / "astronaut.png").convert("RGB").resize((384, 384), Image.Resampling.BICUBIC)
    )
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1
