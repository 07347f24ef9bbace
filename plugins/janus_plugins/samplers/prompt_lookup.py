"""Text in fewer passes: words that follow the same words earlier are drafted, and checked in one pass.

Prompt lookup decoding needs no draft model, and gives the words of the sampler ``text``: answers repeat parts
of their prompt, and of themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import Registry, Session, TextSampler, hookimpl
from janus_modular import Sequence as Prompt
from janus_plugins.samplers.drafts import Integers, NoiseWindow, check_session, confirmed, read_vectors
from janus_plugins.samplers.limits import check_integer
from janus_plugins.samplers.text import TextSettings

NO_TOKEN = -1
"""Stands for the positions of images in a row's text."""


@dataclass
class PromptLookupSettings(TextSettings):
    """How the tokens of an answer are sampled, and how many are drafted."""

    window: int = 8  # positions of a row in one pass: the last known token, and drafts of the next ones
    ngram: int = 3  # tokens that are looked up, at most: the last ones of a row

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            PromptError: a setting is of another type, or out of its range.
        """
        super().__post_init__()
        self.window = check_integer("window", self.window, "a whole number from 1", low=1)
        self.ngram = check_integer("ngram", self.ngram, "a whole number from 1", low=1)


def sample_text(
    session: Session, prompts: Sequence[Prompt], settings: PromptLookupSettings
) -> Generator[NDArray[np.int64], NDArray[np.bool_] | None, None]:
    """Yield the next token ids (rows,); send back which rows continue (rows,), None for all.

    Rows are independent, and each pass takes every row as far as its drafts are right: tokens of rows that
    are ahead of others wait until they are asked for.
    """
    check_session(session, "prompt-lookup", "text", settings.window)
    greedy = settings.temperature == 0
    rngs = [np.random.default_rng((settings.seed, i)) for i in settings.numbers or range(len(prompts))]
    noise = NoiseWindow(rngs, session.vocab_size, greedy=greedy)
    temperature = np.float32(1 if greedy else settings.temperature)
    texts = [np.where(_is_text(prompt), prompt.tokens, NO_TOKEN).tolist() for prompt in prompts]
    waiting = [deque[int]() for _ in prompts]  # sampled tokens that were not asked for yet
    known = np.zeros(len(prompts), np.int64)  # tokens sampled so far
    single = np.ones_like(known)

    def sample(hidden: Any, starts: Integers, counts: Integers, num_positions: int) -> Integers:
        of_window = noise.read(starts, counts, num_positions).reshape(-1, session.vocab_size)
        ids, _ = session.run("sample_text", hidden, of_window, temperature, settings.top_k, settings.top_p)
        chosen: Integers = session.to_host(ids).reshape(-1, num_positions)
        return chosen

    def add(chosen: Integers, counts: Integers) -> None:
        for row, count in enumerate(counts.tolist()):
            texts[row] += chosen[row, :count].tolist()
            waiting[row] += chosen[row, :count].tolist()
        known[:] += counts

    active = np.ones(len(prompts), np.bool_)
    add(sample(session.prefill(prompts), known, single, 1), single)
    for _ in range(settings.max_tokens):
        while any(not waiting[row] for row in np.flatnonzero(active)):
            free = np.minimum(settings.max_tokens - known, session.max_seq_len - session.lengths)
            limits = np.where(active, np.clip(free, [not tokens for tokens in waiting], settings.window), 0)
            drafts = [
                look_up(text, int(limit) - 1, settings.ngram) if limit > 1 else []
                for text, limit in zip(texts, limits, strict=True)
            ]
            counts = np.minimum(limits, [1 + len(of_row) for of_row in drafts])
            num_positions = int(counts.max())
            fed = np.zeros((len(prompts), num_positions), np.int64)
            for row, count in enumerate(counts.tolist()):
                fed[row, :count] = [texts[row][-1], *drafts[row]][:count]
            before = session.lengths
            hidden = session.extend(session.run("embed", fed), counts)  # (rows, W, D)
            chosen = sample(
                session.take(hidden, read_vectors(counts, num_positions).reshape(-1)),
                known,
                counts,
                num_positions,
            )
            right = confirmed(fed[:, 1:], chosen, counts)
            session.truncate(before + right)
            add(chosen, right)
        sent = yield np.array([tokens.popleft() if tokens else 0 for tokens in waiting])
        active = active if sent is None else np.asarray(sent, np.bool_)


def _is_text(prompt: Prompt) -> NDArray[np.bool_]:
    """Return which positions of a prompt (T,) have tokens of a text; others belong to images."""
    return ~(prompt.understanding_mask | prompt.generation_mask)


def look_up(text: Sequence[int], count: int, ngram: int) -> Sequence[int]:
    """Return up to ``count`` tokens that followed the last tokens of a text where they came before.

    Up to ``ngram`` last tokens are looked up, as many as possible, and the latest place is taken. What
    follows there is repeated at its end, as a text that repeats itself goes on; it ends at an image.
    """
    tokens = np.asarray(text, np.int64)
    for size in range(min(ngram, len(tokens) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], size)
        if len(matches := np.flatnonzero((windows == tokens[-size:]).all(1))):
            start = int(matches[-1]) + size
            following: list[int] = np.resize(tokens[start:], count).tolist()
            return following[: following.index(NO_TOKEN)] if NO_TOKEN in following else following
    return []


@hookimpl
def register_text_samplers(registry: Registry[TextSampler[Any]]) -> None:
    """Register ``prompt-lookup``."""
    registry.add("prompt-lookup", sample_text, PromptLookupSettings)
