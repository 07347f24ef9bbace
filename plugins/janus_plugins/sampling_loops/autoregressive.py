"""Drawing code by code, under guidance: Janus' own way (spec of the papers, section 3.4)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from janus_modular import Registry, Sampling, Session, hookimpl, unconditional
from janus_modular import Sequence as Prompt
from janus_plugins.sampling_loops.limits import (
    MOST_GUIDANCE,
    check_float,
    check_integer,
    check_integers,
    check_temperature,
)
from janus_plugins.sampling_loops.noise import exponential_noise


@dataclass
class DrawSettings:
    """How images are drawn."""

    guidance: float = 5.0  # w in l = u + w (c - u); 1: no second row
    temperature: float = 1.0  # 0: always the likeliest code
    seed: int = 0  # of image i: (seed, i)
    first: int = 0  # the number i of a prompt's first image
    numbers: Sequence[int] = ()  # i of each row; left out: counted from first for every prompt

    def __post_init__(self) -> None:
        """Refuse what would draw noise instead of an error."""
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
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """Yield the codes drawn so far and in all; return the images (N, 3, H, W).

    Prompts end where the image begins. Under guidance every image runs in two rows, all the
    conditional ones first; both get the code that was chosen. An image's noise is its own, so
    drawing it alone or in company gives the same.
    """
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    noise = np.ones((len(prompts), session.sizes["codes"]), np.float32)
    greedy = settings.temperature == 0
    guidance, temperature = np.float32(settings.guidance), np.float32(1 if greedy else settings.temperature)
    rows = list(prompts)
    if settings.guidance != 1:
        rows += [unconditional(prompt, session.sizes["pad"]) for prompt in prompts]

    hidden = session.prefill(rows)
    codes = []
    steps = session.sizes["drawing"]
    for step in range(1, steps + 1):
        if not greedy:
            noise = exponential_noise(rngs, noise.shape[1])
        chosen, x = session.run("sample_image", hidden, noise, guidance, temperature)
        codes.append(chosen)
        yield step, steps
        if step < steps:
            hidden = session.step(x)
    return session.to_host(session.run("decode_image", session.stack(codes)))


@hookimpl
def register_sampling_loops(registry: Registry[Sampling]) -> None:
    """Offer Janus' own drawing loop."""
    registry.add("autoregressive", draw, DrawSettings)
