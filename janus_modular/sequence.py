"""A model's input before it becomes tensors: samples of segments, and sequences of token ids.

numpy only: a server that runs exported graphs builds its prompts here too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from PIL import Image

IGNORE_INDEX = -100
"""The label of a position that is not supervised (the default of torch's cross entropy)."""


@dataclass(frozen=True)
class Text:
    """A text segment; the loss is taken on ``supervised`` text alone."""

    text: str  # as the tokenizer gets it
    supervised: bool = False  # counts in the loss


@dataclass(frozen=True)
class ImageInput:
    """An image for the understanding path."""

    image: Image.Image  # of any size, in RGB


@dataclass(frozen=True)
class ImageTarget:
    """An image for the generation path; the loss is taken on ``supervised`` images alone."""

    image: Image.Image  # of any size, in RGB
    supervised: bool = True  # counts in the loss


Segment = Text | ImageInput | ImageTarget


@dataclass(frozen=True)
class Message:
    """A turn: a role (``system``, ``user`` or ``assistant``) and its segments, in order.

    ``reasoning_content`` is the assistant's reasoning before it; chat templates of reasoning models write it.
    """

    role: str  # system, user or assistant
    content: list[Segment]  # texts and images, in order
    reasoning_content: Text | None = None  # before the content


@dataclass(frozen=True)
class Sample:
    """A training sample: a conversation, or bare segments for plain text (``template=False``).

    The messages before the first target image are its condition. Training replaces a share of conditions by
    pads, so that the model learns the unconditional rows of guidance.
    """

    messages: list[Message]  # the turns, in order
    template: bool = True  # formatted by the model's chat template
    source: str = ""  # its name in the mixture
    exact_supervision: bool = False  # exactly the marked segments, whatever the run's `supervise`


@dataclass
class Sequence:
    """A sample as token ids with images (T positions).

    A position belongs to a text token, an input image or a target image; at positions of images ``tokens``
    holds the placeholder id, whose embedding is not used.
    """

    tokens: NDArray[np.int64]  # (T,)
    labels: NDArray[np.int64]  # (T,) the NEXT text token where it is supervised, else IGNORE_INDEX
    understanding_mask: NDArray[np.bool_]  # (T,)
    generation_mask: NDArray[np.bool_]  # (T,)
    understanding_pixels: list[NDArray[np.uint8]] = field(default_factory=list)  # each (3, H, W)
    generation_pixels: list[NDArray[np.uint8]] = field(default_factory=list)  # each (3, h, w)
    generation_supervised: list[bool] = field(default_factory=list)  # for each target image
    source: str = ""  # its name in the mixture
    seed: int = 0  # of the randomness in the targets of its images

    def __len__(self) -> int:
        return len(self.tokens)


def occurrences(prompts: Many[Sequence]) -> list[int]:
    """Return for each prompt the number of equal prompts before it: 0, 1, ... for a repeated prompt.

    Noise derived from this number depends on no other prompt and not on how prompts are batched.
    """
    seen: Counter[bytes] = Counter()
    numbers = []
    for prompt in prompts:
        digest = sha256(prompt.tokens.tobytes())
        for pixels in [*prompt.understanding_pixels, *prompt.generation_pixels]:
            digest.update(pixels.tobytes())
        numbers.append(seen[digest.digest()])
        seen[digest.digest()] += 1
    return numbers


def unconditional(sequence: Sequence, pad: int) -> Sequence:
    """Return the unconditional prompt for guidance: the first and last id, with pads between.

    Pads are attended to, at the same positions as the condition; they replace its images too.
    """
    tokens = np.full_like(sequence.tokens, pad)
    tokens[0], tokens[-1] = sequence.tokens[0], sequence.tokens[-1]
    no_images = np.zeros(len(tokens), np.bool_)
    return replace(
        sequence,
        tokens=tokens,
        labels=np.full_like(sequence.labels, IGNORE_INDEX),
        understanding_mask=no_images,
        generation_mask=no_images.copy(),
        understanding_pixels=[],
        generation_pixels=[],
        generation_supervised=[],
    )
