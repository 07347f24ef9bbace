"""Embeds a batch of prompts of any lengths, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import GraphSignature, PromptError
from janus_modular import Sequence as Prompt
from janus_modular.graph_specs import graph_of_role
from janus_modular.session_errors import encoded_images_refused

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


def embed(
    prompts: Sequence[Prompt], run: Run, *, images_at_once: int, graphs: Mapping[str, GraphSignature]
) -> NDArray[Any]:
    """Combine text, input images and encoded images into embeddings (rows, T, D), padded on the right.

    Without images, the visual encoder does not run. Images go through it a few at a time.

    Raises:
        PromptError: a prompt contains an encoded image, and no graph embeds it; or another number of image
            positions than features.
    """
    shape = (len(prompts), max(map(len, prompts)))
    tokens = np.zeros(shape, np.int64)
    is_input, is_target = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt.tokens
        is_input[row, : len(prompt)] = prompt.understanding_mask
        is_target[row, : len(prompt)] = prompt.generation_mask
    x = run("embed", tokens)  # (R, T, D)
    pixels = [image for prompt in prompts for image in prompt.understanding_pixels]
    read = _understand(pixels, run, images_at_once)
    _merge(x, read, is_input, len(pixels), "read")
    targets = [image for prompt in prompts for image in prompt.generation_images]
    drawn = [_embed_target(image, run, graphs) for image in targets]
    _merge(x, drawn, is_target, len(targets), "drawn")
    return x


def _understand(images: Sequence[NDArray[Any]], run: Run, images_at_once: int) -> list[NDArray[Any]]:
    """Return the embeddings (P, D) of each image; images of one size run together."""
    read: dict[int, NDArray[Any]] = {}
    for shape in dict.fromkeys(image.shape for image in images):
        numbers = [number for number, image in enumerate(images) if image.shape == shape]
        for start in range(0, len(numbers), images_at_once):
            chosen = numbers[start : start + images_at_once]
            embeddings = run("understand", np.stack([images[number] for number in chosen]))  # (N, P, D)
            read |= zip(chosen, embeddings, strict=True)
    return [read[number] for number in range(len(images))]


def _embed_target(image: NDArray[Any], run: Run, graphs: Mapping[str, GraphSignature]) -> NDArray[Any]:
    """Return the embeddings (1, P, D) of an image as the model draws it: of pixels (3, h, w), or encoded.

    Raises:
        PromptError: no graph encodes or embeds it.
    """
    encode, embed_name = graph_of_role(graphs, "encode"), graph_of_role(graphs, "embed")
    is_pixels = image.dtype == np.uint8
    if embed_name is None or (is_pixels and encode is None):
        raise encoded_images_refused()
    return run(embed_name, run(encode, image[None]) if is_pixels else image[None])


def _merge(
    x: NDArray[Any], features: Sequence[NDArray[Any]], mask: NDArray[np.bool_], images: int, verb: str
) -> None:
    """Write features, (P, D) or (N, P, D), into x (R, T, D), in order, where ``mask`` (R, T) is True.

    Raises:
        PromptError: there are more or fewer positions than features.
    """
    flat = [embeddings.reshape(-1, embeddings.shape[-1]) for embeddings in features]
    vectors = np.concatenate(flat) if flat else np.empty((0, x.shape[-1]), x.dtype)
    if len(vectors) != mask.sum():
        raise PromptError(
            f"the prompts have {mask.sum()} places for images that are {verb}, but their {images}"
            f" images have {len(vectors)} features: was the processor made for this bundle?"
        )
    x[mask] = vectors


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
