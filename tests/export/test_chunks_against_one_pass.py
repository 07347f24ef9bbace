"""Positions fed to a session in chunks, compared with one forward pass of the model in torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from janus_modular.janus import Janus
from janus_modular.model.model import JanusModel
from janus_modular.testing.examples import prompt

PROMPTS = ((1, 5, 6, 7, 8), (1, 9))
"""Of two lengths."""
POSITIONS = 19


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> JanusModel:
    return Janus.from_pretrained(tiny_checkpoint).model


@pytest.fixture(params=["onnx", "tensorrt"])
def runtime(
    request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path: Path, machine: Any, build_engines: Any
) -> Any:
    if request.param == "onnx":
        return Janus.from_pretrained(tiny_bundle, runtime={"name": "onnx", "threads": 1}).runtime
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    changes = {"prefill": {"tokens": [4, 4, 16]}}
    build_engines(folder, "fp32", "tensorrt", rows=3, capacity=41, changes=changes)
    return Janus.from_pretrained(folder, runtime="tensorrt").runtime


@torch.no_grad()
def one_pass(model: JanusModel, tokens: tuple[int, ...], x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the hidden states (T, D) of x (T, D) after the tokens of a prompt."""
    whole = torch.cat([model.backbone.embed(torch.tensor([tokens])), torch.from_numpy(x)[None]], dim=1)
    hidden = model.backbone(whole, positions=torch.arange(whole.shape[1])[None])
    return hidden[0, len(tokens) :].numpy()


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_chunks_have_the_hidden_states_of_one_pass(model: JanusModel, runtime: Any, size: int) -> None:
    x = np.random.default_rng(size).standard_normal((2, POSITIONS, 64), np.float32)
    session = runtime.open(40)
    session.prefill([prompt(*tokens) for tokens in PROMPTS])
    chunks = [session.to_host(session.extend(x[:, i : i + size])) for i in range(0, POSITIONS, size)]
    for row, tokens in enumerate(PROMPTS):
        actual, expected = np.concatenate([chunk[row] for chunk in chunks]), one_pass(model, tokens, x[row])
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
