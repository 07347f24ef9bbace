"""A model's input before it becomes tensors: samples of segments, and sequences of token ids.

numpy only: a server that runs exported graphs builds its prompts here too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_modular.errors import PromptError
from janus_modular.renamed import explain_renamed

IGNORE_INDEX = -100
"""The label of a position that is not supervised (the default of torch's cross entropy)."""


@dataclass(frozen=True)
class Text:
    """A text segment."""

    text: str  # as the tokenizer gets it
    supervised: bool = False  # True: the loss counts its tokens


@explain_renamed
@dataclass(frozen=True)
class ImageInput:
    """An image for the understanding path."""

    image: Image.Image  # of any size, in RGB


@dataclass(frozen=True)
class EncodedSpec:
    """The shape and type of an encoded image: int64 ids of codes, or float32 latents."""

    shape: tuple[int, ...]  # of an encoded image: (P,), (P, S) or (C, h, w), for example
    ids: tuple[int, ...] | None = None  # codebook sizes: K, or one per entry of the last axis; None: latents

    @property
    def dtype(self) -> str:
        """The dtype of encoded images: int64 or float32."""
        return "float32" if self.ids is None else "int64"

    def checked(self, encoded: Any) -> NDArray[Any]:
        """Return an encoded image as an array of this shape and dtype.

        Raises:
            ValueError: the shape or type differs, or a value is outside the codebook or not finite.
        """
        array = np.asarray(encoded)
        dtype_kinds = "iu" if self.ids else "f"
        if array.shape != self.shape or array.dtype.kind not in dtype_kinds:
            raise ValueError(
                f"found an array {array.shape} of {array.dtype}; expected {self.shape} of {self.dtype}"
            )
        array = array.astype(self.dtype)
        if self.ids is None and not np.isfinite(array).all():
            raise ValueError("found NaN or infinite numbers; expected finite ones")
        if self.ids is not None and ((array < 0) | (array >= self.ids)).any():
            raise ValueError(
                f"found codes from {array.min()} to {array.max()}; expected codes from 0, below"
                f" {' and '.join(map(str, self.ids))}. Codes of another image tokenizer do not fit"
            )
        return array


@explain_renamed
@dataclass(frozen=True)
class ImageTarget:
    """An image for the generation path to generate: either ``image``, or ``encoded``."""

    image: Image.Image | None = None  # of any size, in RGB
    supervised: bool = True  # True: the loss counts its positions
    encoded: NDArray[Any] | None = None  # codes or latents, as the generation path's `EncodedSpec` describes

    def __post_init__(self) -> None:
        """Raise PromptError unless there is either an image or an array."""
        if (self.image is None) == (self.encoded is None):
            both = "both" if self.encoded is not None else "neither"
            raise PromptError(f"ImageTarget: found {both}; expected either image=... or encoded=...")


Segment = Text | ImageInput | ImageTarget


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: str  # system, user or assistant
    content: list[Segment]  # texts and images, in order
    reasoning_content: Text | None = None  # reasoning before the content, for templates of reasoning models


@dataclass(frozen=True)
class Sample:
    """A training sample: a conversation, or plain text without a chat template (``template=False``).

    The messages before the first target image are its condition. With the probability
    ``condition_dropout``, training replaces them by padding, for classifier-free guidance.
    """

    messages: list[Message]  # the turns, in order
    template: bool = True  # format the messages by the model's chat template
    source: str = ""  # name of its source in the mixture
    exact_supervision: bool = False  # True: the loss counts the supervised segments, whatever `supervise` is


@explain_renamed
@dataclass
class Sequence:
    """A tokenized sample of T positions.

    A position is a text token, or belongs to an input image or a target image. At positions of images,
    ``tokens`` has the placeholder id, whose embedding is replaced.
    """

    tokens: NDArray[np.int64]  # (T,)
    labels: NDArray[np.int64]  # (T,) the NEXT text token if it is supervised, else IGNORE_INDEX
    understanding_mask: NDArray[np.bool_]  # (T,) True at positions of input images
    generation_mask: NDArray[np.bool_]  # (T,) True at positions of target images
    understanding_pixels: list[NDArray[np.uint8]] = field(default_factory=list)  # each (3, H, W)
    understanding_counts: list[int] = field(default_factory=list)  # positions of each; empty: all have equal
    generation_images: list[NDArray[Any]] = field(
        default_factory=list
    )  # each (3, h, w) uint8, or encoded, of another dtype
    generation_supervised: list[bool] = field(default_factory=list)  # for each target image
    source: str = ""  # name of its source in the mixture
    seed: int = 0  # of the randomness in the targets of its images, such as noise
    together: NDArray[np.int64] | None = None  # (T,) positions of one number above 0 attend to each other
    hidden: NDArray[np.bool_] | None = None  # (T,) positions that no other attends to; never the first
    position_ids: NDArray[np.int64] | None = None  # (P, T) on P axes, if the backbone has M-RoPE

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def input_counts(self) -> list[int]:
        """The number of positions of each input image."""
        images = len(self.understanding_pixels)
        if self.understanding_counts or not images:
            return self.understanding_counts
        return [int(self.understanding_mask.sum()) // images] * images

    def inputs_before(self, end: int) -> int:
        """Return how many input images lie before the position ``end``, whole."""
        positions = int(self.understanding_mask[:end].sum())
        return int(np.searchsorted(np.cumsum(self.input_counts), positions, side="right"))

    @property
    def image_positions(self) -> int:
        """The number of positions of images, input and target images."""
        return int(self.understanding_mask.sum() + self.generation_mask.sum())


def occurrences(prompts: Many[Sequence]) -> list[int]:
    """Return for each prompt the number of equal prompts before it: 0, 1, ... for a repeated prompt.

    Noise that is derived from this number depends neither on other prompts nor on the batch.
    """
    seen: Counter[bytes] = Counter()
    numbers = []
    for prompt in prompts:
        digest = sha256(prompt.tokens.tobytes())
        for pixels in [*prompt.understanding_pixels, *prompt.generation_images]:
            digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
        numbers.append(seen[digest.digest()])
        seen[digest.digest()] += 1
    return numbers


def without_encoded_images(sequence: Sequence, pad: int) -> Sequence:
    """Return a prompt with pads in place of images in the form in which the model draws, which are seen.

    Guidance with three rows draws towards the whole prompt and towards this one.
    """
    is_image = sequence.generation_mask
    return replace(
        sequence,
        tokens=np.where(is_image, pad, sequence.tokens),
        generation_mask=np.zeros_like(is_image),
        generation_images=[],
        generation_supervised=[],
    )


def unconditional(sequence: Sequence, pad: int, *, hidden: bool = False) -> Sequence:
    """Return the unconditional prompt for guidance: padding replaces all ids but the first and the last.

    The prompt keeps its length and positions, and padding is attended to. With ``hidden``, all positions of
    the prompt but the first are masked instead.
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
        understanding_counts=[],
        generation_images=[],
        generation_supervised=[],
        together=None if sequence.together is None else np.zeros_like(sequence.together),
        hidden=np.arange(len(tokens)) > 0 if hidden and len(tokens) > 1 else None,
    )
