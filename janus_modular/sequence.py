"""What goes into a model, before there are tensors: samples of segments, and sequences of token ids.

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
    """Words; ``supervised`` ones are learned, the others only read."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class ImageInput:
    """An image that goes through the understanding path."""

    image: Image.Image


@dataclass(frozen=True)
class ImageTarget:
    """An image that goes through the generation path; ``supervised`` ones are learned."""

    image: Image.Image
    supervised: bool = True


Segment = Text | ImageInput | ImageTarget


@dataclass(frozen=True)
class Message:
    """One turn: a role (``system``, ``user`` or ``assistant``) and what it says, in order.

    ``reasoning_content`` is what the assistant thought before; chat templates of models that reason write it.
    """

    role: str
    content: list[Segment]
    reasoning_content: Text | None = None


@dataclass(frozen=True)
class Sample:
    """One training sample: a conversation, or bare segments for plain text (``template=False``).

    The messages before the first image to draw are its condition, which training replaces by pads now
    and then, so that guidance has an unconditional row to lean on.
    """

    messages: list[Message]
    template: bool = True  # written as the model's chat template has it
    source: str = ""  # its name in the mixture
    exact_supervision: bool = False  # learn what is marked and nothing else, whatever the run's `supervise`


@dataclass
class Sequence:
    """One sample as token ids with images (T positions).

    A position belongs to a text token, to an image that is read, or to an image that is drawn;
    at images ``tokens`` holds the placeholder id, whose embedding is never looked at.
    """

    tokens: NDArray[np.int64]  # (T,)
    labels: NDArray[np.int64]  # (T,) the NEXT text token where it is supervised, else IGNORE_INDEX
    understanding_mask: NDArray[np.bool_]  # (T,)
    generation_mask: NDArray[np.bool_]  # (T,)
    understanding_pixels: list[NDArray[np.uint8]] = field(default_factory=list)  # each (3, H, W)
    generation_pixels: list[NDArray[np.uint8]] = field(default_factory=list)  # each (3, h, w)
    generation_supervised: list[bool] = field(default_factory=list)  # one for each drawn image
    source: str = ""
    seed: int = 0  # of the randomness in the targets of its images

    def __len__(self) -> int:
        return len(self.tokens)


def occurrences(prompts: Many[Sequence]) -> list[int]:
    """Return for each prompt how many equal ones come before it: 0, 1, ... for a prompt that is repeated.

    Noise that goes by this number is a row's own: it depends on no other prompt, nor on where a batch begins.
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
    """Return a prompt's twin that knows nothing: its first and last id, pads between.

    The pads are seen, at the same positions (Janus draws with guidance against this row). Images
    in the condition are padded over too.
    """
    tokens = np.full_like(sequence.tokens, pad)
    tokens[0], tokens[-1] = sequence.tokens[0], sequence.tokens[-1]
    nowhere = np.zeros(len(tokens), np.bool_)
    return replace(
        sequence,
        tokens=tokens,
        labels=np.full_like(sequence.labels, IGNORE_INDEX),
        understanding_mask=nowhere,
        generation_mask=nowhere.copy(),
        understanding_pixels=[],
        generation_pixels=[],
        generation_supervised=[],
    )
