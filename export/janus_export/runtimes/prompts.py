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
