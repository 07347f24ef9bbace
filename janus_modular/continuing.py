"""Sequences that go on: behind a prompt follow sampled tokens and drawn images. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.positions import extended
from janus_modular.sequence import IGNORE_INDEX, Sequence


def with_tokens(prompt: Sequence, ids: Many[int]) -> Sequence:
    """Return a prompt with tokens behind it; nothing that is added is supervised."""
    return _extended(prompt, np.array(ids, np.int64), is_image=False)


def with_image(prompt: Sequence, image: NDArray[Any], positions: int) -> Sequence:
    """Return a prompt with an encoded image of so many positions behind it."""
    placeholders = np.repeat(prompt.tokens[-1:], positions)  # any id: an image's ids are not embedded
    longer = _extended(prompt, placeholders, is_image=True)
    return replace(
        longer,
        generation_images=[*prompt.generation_images, image],
        generation_supervised=[*prompt.generation_supervised, False],
    )


def _extended(prompt: Sequence, ids: NDArray[np.int64], *, is_image: bool) -> Sequence:
    count = len(ids)
    return replace(
        prompt,
        tokens=np.concatenate([prompt.tokens, ids]),
        labels=np.concatenate([prompt.labels, np.full(count, IGNORE_INDEX)]),
        understanding_mask=np.concatenate([prompt.understanding_mask, np.zeros(count, np.bool_)]),
        generation_mask=np.concatenate([prompt.generation_mask, np.full(count, is_image)]),
        position_ids=None if prompt.position_ids is None else extended(prompt.position_ids, count),
        together=None if prompt.together is None else np.pad(prompt.together, (0, count)),
        hidden=None if prompt.hidden is None else np.pad(prompt.hidden, (0, count)),
    )
