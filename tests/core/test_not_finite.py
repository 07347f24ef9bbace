"""NaN and infinite logits are an error in a session."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch

from janus_modular import NOT_FINITE, Janus, NotFiniteError, mark_not_finite, refuse_not_finite
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig
from janus_modular.samplers import check_images

NAN, INF = float("nan"), float("inf")
Use = Callable[[Janus], object]


@pytest.fixture(scope="module")
def sound() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))


@pytest.fixture
def janus(sound: Janus) -> Janus:
    """A model to be damaged."""
    return Janus.of(ModelAssembly(deepcopy(sound.model), sound.processor))


def greedy(janus: Janus) -> str:
    return janus.chat("hello", max_tokens=3)


def truncated(janus: Janus) -> list[str]:
    return janus.chat_batch(
        [("hello", ()), ("hello again", ())], max_tokens=3, temperature=1, top_k=5, top_p=0.9
    )


def drawn(janus: Janus) -> object:
    return janus.draw("a cat")


def unguided(janus: Janus) -> object:
    return janus.draw("a cat", 2, guidance=1, temperature=0)


@pytest.mark.parametrize("use", [greedy, truncated, drawn, unguided])
@pytest.mark.parametrize(
    ("weight", "value", "affected"),
    [
        ("backbone.model.model.layers.0.mlp.up_proj.weight", NAN, {greedy, truncated, drawn, unguided}),
        ("backbone.model.model.norm.weight", INF, {greedy, truncated, drawn, unguided}),
        ("backbone.model.model.norm.weight", 3e38, {greedy, truncated, drawn, unguided}),
        ("generation.head", NAN, {drawn, unguided}),
        ("generation.adaptor", NAN, {drawn, unguided}),
    ],
)
def test_a_torch_session_says_that_its_logits_are_not_finite(
    janus: Janus, use: Use, weight: str, value: float, affected: set[Use]
) -> None:
    for name, one in janus.model.named_parameters():
        if name.startswith(weight):
            one.data.view(-1)[0] = value
    if value == 3e38:  # finite weights, whose products are not
        janus.model.backbone.get_parameter("model.model.norm.weight").data.fill_(value)
    if use not in affected:
        use(janus)
        return
    with pytest.raises(NotFiniteError, match="logits are NaN or infinite"):
        use(janus)


def test_a_decoder_that_overflows_is_an_error(janus: Janus) -> None:
    for weight in janus.model.generation.tokenizer.decoder.parameters():
        weight.data.fill_(1e30)
    with pytest.raises(NotFiniteError, match="decoder gives NaN or infinities"):
        janus.draw("a cat")


def test_ids_are_marked_where_logits_are_not_finite() -> None:
    logits = torch.zeros(6, 9)
    logits[1, 3], logits[2], logits[3, 8], logits[4], logits[5, :4] = NAN, NAN, INF, -INF, -INF
    ids = torch.arange(6)
    assert mark_not_finite(ids, logits).tolist() == [0, NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE, 5]


def test_values_copied_to_the_host_are_checked_for_not_finite() -> None:
    kept = np.array([[0, 1], [2, 3]])
    assert refuse_not_finite(kept) is kept
    assert refuse_not_finite(np.array([-1.0])) == -1  # states may be negative
    with pytest.raises(NotFiniteError, match="1 of 2 sampled ids"):
        refuse_not_finite(np.array([5, NOT_FINITE]))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pixels_that_a_loop_returns_are_finite(value: float) -> None:
    pixels = np.zeros((2, 3, 4, 4), np.float32)
    pixels[1, 2, 3, 3] = value
    with pytest.raises(NotFiniteError, match="'flow' returned pixels"):
        check_images("flow", pixels, 2)
