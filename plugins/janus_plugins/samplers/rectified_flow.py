"""Drawing by rectified flow: Euler steps from noise to the image, as JanusFlow does (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import (
    EncodedImages,
    ImageSampler,
    ImageSamplerSettings,
    Registry,
    Session,
    hookimpl,
    unconditional,
)
from janus_modular import Sequence as Prompt
from janus_plugins.samplers.limits import MOST_GUIDANCE, check_float, check_integer, check_integers

MOST_STEPS = 10_000
"""Smaller steps than 1 / 10,000 change a float32 image by no more than rounding does."""


@dataclass
class FlowSettings(ImageSamplerSettings):
    """Settings of the Euler sampler."""

    guidance: float = 2.0  # w in v = u + w (c - u); 1: no unconditional row
    steps: int = 30  # from noise to the image
    seed: int = 0  # of the noise of image i: (seed, i)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            PromptError: a setting is of another type, or out of its range.
        """
        expected = f"a number from {-MOST_GUIDANCE:,.0f} to {MOST_GUIDANCE:,.0f}; 1 is none"
        self.guidance = check_float(
            "guidance", self.guidance, expected, low=-MOST_GUIDANCE, high=MOST_GUIDANCE
        )
        self.steps = check_integer(
            "steps", self.steps, f"a whole number from 1 to {MOST_STEPS:,}", low=1, high=MOST_STEPS
        )
        self.seed = check_integer("seed", self.seed, "a whole number from 0", low=0)
        self.numbers = check_integers("numbers", self.numbers)
        self.first = check_integer("first", self.first, "a whole number from 0", low=0)


def draw(
    session: Session, prompts: Sequence[Prompt], settings: FlowSettings
) -> Generator[tuple[int, int], None, EncodedImages]:
    """Yield (steps done, steps in all); return the images (N, 3, H, W) with their latents.

    Prompts end where the image begins. With guidance every image has two rows; all conditional rows come
    first. Each image has its own noise, so that an image does not depend on other images.
    """
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    shape = session.sizes["encoded_shape"]
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    noise = np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])  # (N, c, h, w)
    rows = list(prompts)
    if settings.guidance != 1:
        hidden = session.sizes["hidden_condition"]
        rows += [unconditional(prompt, session.pad_id, hidden=hidden) for prompt in prompts]
    mixture = yield from follow(session, rows, noise, settings)
    images = session.to_host(session.run("decode_image", mixture))
    return EncodedImages(images, session.to_host(mixture))


def follow(
    session: Session, rows: Sequence[Prompt], noise: NDArray[np.float32], settings: FlowSettings
) -> Generator[tuple[int, int], None, Any]:
    """Integrate the velocity from noise (N, c, h, w); yield the progress, and return the latents.

    Prompts are prefilled once. Each step appends the positions of its mixture to the cache, and removes them.
    """
    positions = session.image_positions
    order = np.arange(len(rows) * positions).reshape(len(rows), positions) % (len(noise) * positions)
    session.prefill(rows)
    lengths = session.lengths
    step, guidance = np.float32(1 / settings.steps), np.float32(settings.guidance)
    mixture: Any = noise
    for number in range(settings.steps):
        time = np.float32(number / settings.steps)
        embeddings, skip = session.run("embed_mixture", mixture, time)
        hidden = session.extend(session.take(embeddings, order))  # (rows, num_tokens, D)
        mixture = session.run("advance", hidden, skip, mixture, time, step, guidance)
        session.truncate(lengths)
        yield number + 1, settings.steps
    return mixture


@hookimpl
def register_image_samplers(registry: Registry[ImageSampler[Any]]) -> None:
    """Register ``rectified-flow``."""
    registry.add("rectified-flow", draw, FlowSettings)
