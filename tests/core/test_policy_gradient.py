"""A policy objective of a third party, GRPO on drawn codes, through public names alone.

The loss is that of "DeepSeekMath", section 4.1 (group relative policy optimisation), for codes in place of
words: rewards of a group are normalised by its mean and deviation, and the ratio of probabilities is clipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from janus_modular import Janus, image_log_probabilities
from janus_modular.checkpoints import ModelAssembly
from janus_modular.config import load, resolve
from janus_modular.config.schema import ModelConfig

SETTINGS = {"guidance": 2.0, "temperature": 1.0}
GROUP = 8


def reward(codes: np.ndarray) -> float:
    """Prefer codes of the lower half of the codebook."""
    return float((codes < 32).mean())


def grpo_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float = 0.2) -> Tensor:
    """Return the loss of log-probabilities (N, P) under the policy that learns, and the one that drew."""
    ratio = (new - old).exp()
    weighted = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -weighted.mean()


@pytest.fixture
def janus() -> Janus:
    torch.manual_seed(0)
    return Janus.of(ModelAssembly.from_config(resolve(load("model/tiny"), ModelConfig)))


def drawn_group(janus: Janus, prompt: str, seed: int) -> tuple[list[np.ndarray], Tensor]:
    codes = janus.draw(prompt, GROUP, seed=seed, **SETTINGS).encoded
    assert codes is not None
    rewards = torch.tensor([reward(np.asarray(image)) for image in codes])
    return list(codes), rewards


def test_drawings_get_a_higher_reward(janus: Janus, tmp_path: Path) -> None:
    path = janus.model.generation
    parameters = [*path.head.parameters(), *path.adaptor.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    means = []
    for step in range(15):
        codes, rewards = drawn_group(janus, "a cat", step)
        means.append(float(rewards.mean()))
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None]
        prompts = [janus.processor.draw_prompt("a cat")] * GROUP
        new = image_log_probabilities(janus.model, prompts, codes, pad_id=janus.processor.pad_id, **SETTINGS)
        if step == 0:  # the policy that learns is the one that drew
            scores = torch.from_numpy(np.asarray(janus.log_probabilities("a cat", codes, **SETTINGS)))
            torch.testing.assert_close(new.detach(), scores, rtol=0, atol=1e-5)
        loss = grpo_loss(new, new.detach(), advantages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.mean(means[:3]) < 0.6  # measured: 0.54
    assert np.mean(means[-3:]) > 0.7  # measured: 0.83
    janus.save_pretrained(tmp_path / "model")
    again = Janus.from_pretrained(tmp_path / "model", device="cpu")
    assert np.array_equal(
        np.stack(again.draw("a cat", 2, **SETTINGS).encoded),
        np.stack(janus.draw("a cat", 2, **SETTINGS).encoded),
    )
