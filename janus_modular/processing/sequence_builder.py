"""From encoded parts to a sequence: labels, the places of images, and the row without its condition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from janus_modular.errors import PromptError
from janus_modular.interfaces import PixelSpec
from janus_modular.processing.image_io import open_image
from janus_modular.processing.image_transforms import generation_pixels, understanding_pixels
from janus_modular.processing.prompt_segments import PromptSegment
from janus_modular.processing.text_tokenizer import Encoded
from janus_modular.sequence import IGNORE_INDEX, ImageInput, ImageTarget
from janus_modular.sequence import Sequence as TokenSequence


def lay_out(
    encoded: Encoded, parts: Sequence[PromptSegment], *, bos: int | None, read: int, draw: int
) -> TokenSequence:
    """Give every token its position and every image its ``read`` or ``draw`` positions; no pixels yet.

    A token is learned if any of its letters is. Labels are one ahead: what a position has to say is
    the token that follows it.
    """
    reads = np.array([isinstance(part.image, ImageInput) for part in parts], np.bool_)  # (parts,)
    draws = np.array([isinstance(part.image, ImageTarget) for part in parts], np.bool_)
    before = np.cumsum([0, *(part.learned for part in parts)])  # how many parts before each are learned
    learned = before[encoded.last + 1] > before[encoded.first]  # (tokens,)
    count = np.where(reads, read, np.where(draws, draw, 1))[encoded.first]
    owner = np.repeat(encoded.first, count)  # (T,), BOS apart
    start = np.array([] if bos is None else [bos], np.int64)
    nobody = np.zeros(len(start), np.bool_)
    tokens = np.concatenate([start, np.repeat(encoded.ids, count)])  # (T,)
    targets = np.concatenate([nobody, np.repeat(learned, count)])[1:]
    labels = np.full(len(tokens), IGNORE_INDEX, np.int64)
    labels[:-1] = np.where(targets, tokens[1:], IGNORE_INDEX)
    return TokenSequence(
        tokens, labels, np.concatenate([nobody, reads[owner]]), np.concatenate([nobody, draws[owner]])
    )


def with_pixels(
    sequence: TokenSequence,
    parts: Sequence[PromptSegment],
    read: PixelSpec,
    draw: tuple[int, int] | None,
) -> TokenSequence:
    """Add the pixels of all images: ``read`` says how they are read, ``draw`` the size of drawn ones.

    Raises:
        ImageError: an image is damaged, too large, or none.
        PromptError: there is one to draw, and nothing to draw with.
    """
    images = [part.image for part in parts]
    drawn = [image for image in images if isinstance(image, ImageTarget)]
    if drawn and draw is None:
        raise PromptError("there is an image to draw, and this model has no generation path.")
    height, width = draw or (0, 0)
    return replace(
        sequence,
        understanding_pixels=[
            understanding_pixels(open_image(p.image), read) for p in images if isinstance(p, ImageInput)
        ],
        generation_pixels=[generation_pixels(open_image(p.image), height=height, width=width) for p in drawn],
        generation_supervised=[p.supervised for p in drawn],
    )


def without_condition(sequence: TokenSequence, *, pad: int, read: int) -> TokenSequence:
    """Replace by pads what comes before the first drawn image, all but the first and the last position.

    What remains before the image is what an unconditional prompt is when drawing; nothing in it is
    learned, and images in it are dropped. ``read`` is how many positions an image to read takes.
    """
    last = int(sequence.generation_mask.argmax()) - 1  # begin-of-image
    tokens, labels = sequence.tokens.copy(), sequence.labels.copy()
    reads = sequence.understanding_mask.copy()
    dropped = int(reads[:last].sum()) // max(read, 1)
    tokens[1:last] = pad
    labels[:last] = IGNORE_INDEX
    reads[:last] = False
    return replace(
        sequence,
        tokens=tokens,
        labels=labels,
        understanding_mask=reads,
        understanding_pixels=sequence.understanding_pixels[dropped:],
    )
