"""Embeds a batch of prompts of any lengths, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import PromptError
from janus_modular import Sequence as Prompt

Run = Callable[..., NDArray[Any]]
"""Runs a graph by name on numpy arrays."""


def block_spans(blocks: NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    """Split positions into spans (start, count) of up to ``limit``, or as many as a block needs.

    No span divides a block of any row of ``blocks`` (rows, T), since its positions attend to each other.
    """
    divided = ((blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] > 0)).any(0)  # by a cut behind t
    cuts = [*(np.flatnonzero(~divided) + 1).tolist(), blocks.shape[1]]
    spans, start = [], 0
    while start < blocks.shape[1]:
        fitting = [cut for cut in cuts if start < cut <= start + limit]
        end = max(fitting) if fitting else min(cut for cut in cuts if cut > start)
        spans.append((start, end - start))
        start = end
    return spans


def embed(prompts: Sequence[Prompt], run: Run, *, images_at_once: int) -> NDArray[Any]:
    """Combine text and input images into one array of embeddings (rows, T, D), padded on the right.

    Without images, the visual encoder does not run. Images go through it a few at a time.

    Raises:
        PromptError: a prompt contains a target image, or another number of image positions than features.
    """
    if any(prompt.generation_mask.any() for prompt in prompts):
        raise PromptError("a bundle does not encode target images of a prompt: pass them as input images")
    shape = (len(prompts), max(map(len, prompts)))
    tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt.tokens
        mask[row, : len(prompt)] = prompt.understanding_mask
    x = run("embed", tokens)  # (R, T, D)
    pixels = [image for prompt in prompts for image in prompt.understanding_pixels]
    if not pixels and not mask.any():
        return x
    features = [
        run("understand", np.stack(pixels[start : start + images_at_once]))  # (N, P, D)
        for start in range(0, len(pixels), images_at_once)
    ]
    flat = [embeddings.reshape(-1, embeddings.shape[-1]) for embeddings in features]
    vectors = np.concatenate(flat) if flat else np.empty((0, x.shape[-1]), x.dtype)
    if len(vectors) != mask.sum():
        raise PromptError(
            f"the prompts have {mask.sum()} places for images that are read, but their {len(pixels)}"
            f" images have {len(vectors)} features: was the processor made for this bundle?"
        )
    x[mask] = vectors
    return x


def chunks(total: int, low: int, high: int, *, overlap: bool = True) -> list[tuple[int, int]]:
    """Split ``total`` positions into few chunks (start, count) of one size between ``low`` and ``high``.

    If ``total`` is not a multiple, the last chunk overlaps the previous one: rewriting a position with the
    same values changes nothing. Without ``overlap``, for recurrent layers, it is shorter. A ``total`` below
    ``low`` becomes one chunk, longer than ``total``.
    """
    num_chunks = -(-total // high)
    count = max(-(-total // num_chunks), low)
    if not overlap:
        return [(start, max(min(count, total - start), low)) for start in range(0, total, count)]
    return [(max(min(start, total - count), 0), count) for start in range(0, num_chunks * count, count)]
