"""A tiny model with random weights, and requests of every sort with the results that each has alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.janus import Janus
from janus_modular.serving import AnswerRequest, DrawRequest
from janus_modular.testing.serving import alone, mixed_requests


@pytest.fixture(scope="session")
def tiny() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("tiny"), ModelConfig)))


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]


@pytest.fixture(scope="session")
def expected(tiny: Janus, photos: list[Image.Image]) -> list[tuple[AnswerRequest | DrawRequest, Any]]:
    """Requests of every sort, and what each gives alone."""
    return [(request, alone(tiny, request)) for request in mixed_requests(24, photos)]
