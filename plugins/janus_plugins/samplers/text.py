"""The text sampler: one token per step for every active row."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import Registry, Session, TextSampler, TextSamplerSettings, hookimpl
from janus_modular import Sequence as Prompt
from janus_plugins.samplers.limits import (
    LEAST_TOP_P,
    MOST_INTEGER,
    check_float,
    check_integer,
    check_integers,
    check_temperature,
)
from janus_plugins.samplers.noise import exponential_noise


@dataclass
class TextSettings(TextSamplerSettings):
    """How the tokens of an answer are sampled."""

    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # 1: no limit
    seed: int = 0  # a row's noise follows from the seed and the row's number

    def __post_init__(self) -> None:
        """Check the settings: a wrong one would answer with nonsense.

        Raises:
            PromptError: a setting is of another type, or out of its range.
        """
        self.max_tokens = check_integer("max_tokens", self.max_tokens, "a whole number from 1", low=1)
        self.temperature = check_temperature(self.temperature)
        self.top_k = check_integer(
            "top_k",
            self.top_k,
            "a whole number from 0, which is no limit, to 2**63 - 1",
            low=0,
            high=MOST_INTEGER,
        )
        self.top_p = check_float(
            "top_p", self.top_p, "a number above 0 and up to 1, which is no limit", low=LEAST_TOP_P, high=1
        )
        self.seed = check_integer("seed", self.seed, "a whole number from 0", low=0)
        self.numbers = check_integers("numbers", self.numbers)


def sample_text(
    session: Session, prompts: Sequence[Prompt], settings: TextSettings
) -> Generator[NDArray[np.int64], NDArray[np.bool_] | None, None]:
    """Yield the next token ids (rows,); send back which rows continue (rows,), None for all.

    Rows are independent: each has noise of its own, from the seed and its number alone.
    """
    rngs = [np.random.default_rng((settings.seed, i)) for i in settings.numbers or range(len(prompts))]
    greedy = settings.temperature == 0
    noise = np.ones((len(prompts), session.vocab_size), np.float32)
    temperature = np.float32(1 if greedy else settings.temperature)
    hidden = session.prefill(prompts)
    for step in range(settings.max_tokens):
        if not greedy:
            noise = exponential_noise(rngs, noise.shape[1])
        ids, x = session.run("sample_text", hidden, noise, temperature, settings.top_k, settings.top_p)
        active = yield session.to_host(ids)
        if step + 1 < settings.max_tokens:  # the state after the last token is not read
            hidden = session.step(x, active)


@hookimpl
def register_text_samplers(registry: Registry[TextSampler[Any]]) -> None:
    """Register ``text``."""
    registry.add("text", sample_text, TextSettings)
