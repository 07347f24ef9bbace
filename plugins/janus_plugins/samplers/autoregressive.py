"""Drawing code by code with classifier-free guidance, as Janus does (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from janus_plugins.samplers.limits import (
    MOST_GUIDANCE,
    check_float,
    check_integer,
    check_integers,
    check_temperature,
)
from janus_plugins.samplers.noise import exponential_noise


@dataclass
class DrawSettings(ImageSamplerSettings):
    """How codes are sampled."""

    guidance: float = 5.0  # w in l = u + w (c - u); 1: no unconditional row
    temperature: float = 1.0  # 0: always the most likely code
    seed: int = 0  # of the noise of image i: (seed, i)

    def __post_init__(self) -> None:
        """Check the settings: a wrong one would draw noise.

        Raises:
            PromptError: a setting is of another type, or out of its range.
        """
        expected = f"a number from {-MOST_GUIDANCE:,.0f} to {MOST_GUIDANCE:,.0f}; 1 is none"
        self.guidance = check_float(
            "guidance", self.guidance, expected, low=-MOST_GUIDANCE, high=MOST_GUIDANCE
        )
        self.temperature = check_temperature(self.temperature)
        self.seed = check_integer("seed", self.seed, "a whole number from 0", low=0)
        self.numbers = check_integers("numbers", self.numbers)
        self.first = check_integer("first", self.first, "a whole number from 0", low=0)


def draw(
    session: Session, prompts: Sequence[Prompt], settings: DrawSettings
) -> Generator[tuple[int, int], None, EncodedImages]:
    """Yield the number of codes drawn so far, and of all; return the images (N, 3, H, W), and their codes.

    Prompts end where the image begins. With guidance every image has two rows, which get the same code; all
    conditional rows come first. An image has noise of its own, so that it does not depend on other images.
    """
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    noise = np.ones((len(prompts), session.sizes["codes"]), np.float32)
    greedy = settings.temperature == 0
    guidance, temperature = np.float32(settings.guidance), np.float32(1 if greedy else settings.temperature)
    rows = list(prompts)
    if settings.guidance != 1:
        rows += [unconditional(prompt, session.pad_id) for prompt in prompts]

    hidden = session.prefill(rows)
    codes = []
    steps = session.image_positions
    for step in range(1, steps + 1):
        if not greedy:
            noise = exponential_noise(rngs, noise.shape[1])
        chosen, x = session.run("sample_image", hidden, noise, guidance, temperature)
        codes.append(chosen)
        yield step, steps
        if step < steps:
            hidden = session.step(x)
    joined = session.stack(codes)  # (N, P), or (N, P, S)
    images = session.to_host(session.run("decode_image", joined))
    return EncodedImages(images, session.to_host(joined))


@hookimpl
def register_image_samplers(registry: Registry[ImageSampler[Any]]) -> None:
    """Register ``autoregressive``."""
    registry.add("autoregressive", draw, DrawSettings)
