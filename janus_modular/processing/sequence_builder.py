"""From encoded segments to a token sequence: labels, image positions, pixels, and the unconditional row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular.errors import PromptError
from janus_modular.foreign import printable
from janus_modular.interfaces import PixelSpec
from janus_modular.processing.image_io import open_image
from janus_modular.processing.image_transforms import encoder_inputs, generation_pixels
from janus_modular.processing.prompt_segments import PromptSegment
from janus_modular.processing.text_tokenizer import Encoded
from janus_modular.sequence import IGNORE_INDEX, EncodedSpec, ImageInput, ImageTarget
from janus_modular.sequence import Sequence as TokenSequence


def build_sequence(
    encoded: Encoded,
    segments: Sequence[PromptSegment],
    *,
    bos: int | None,
    input_counts: Sequence[Sequence[int]],
    drawing_tokens: int,
) -> TokenSequence:
    """Return the sequence of encoded segments, without pixels.

    An image input takes ``input_counts`` positions, in order: those of each of its tiles. An image target
    takes ``drawing_tokens``. A token is supervised if any of its characters is. The label of a position is
    the token that follows it.
    """
    is_input = np.array([isinstance(segment.image, ImageInput) for segment in segments], np.bool_)
    is_target = np.array([isinstance(segment.image, ImageTarget) for segment in segments], np.bool_)
    # How many segments before each one are supervised; a token may span several segments.
    supervised_before = np.cumsum([0, *(segment.supervised for segment in segments)])
    supervised = supervised_before[encoded.last + 1] > supervised_before[encoded.first]  # (tokens,)
    counts_of_segments = np.where(is_target, drawing_tokens, 1)
    counts_of_segments[is_input] = [sum(counts) for counts in input_counts]
    counts = counts_of_segments[encoded.first]
    segment_of = np.repeat(encoded.first, counts)  # (T,), without BOS
    first_ids = np.array([] if bos is None else [bos], np.int64)
    not_bos = np.zeros(len(first_ids), np.bool_)
    tokens = np.concatenate([first_ids, np.repeat(encoded.ids, counts)])  # (T,)
    next_is_supervised = np.concatenate([not_bos, np.repeat(supervised, counts)])[1:]
    labels = np.full(len(tokens), IGNORE_INDEX, np.int64)
    labels[:-1] = np.where(next_is_supervised, tokens[1:], IGNORE_INDEX)
    return TokenSequence(
        tokens,
        labels,
        understanding_mask=np.concatenate([not_bos, is_input[segment_of]]),
        understanding_counts=[count for counts in input_counts for count in counts],
        generation_mask=np.concatenate([not_bos, is_target[segment_of]]),
    )


def input_pixels(segments: Sequence[PromptSegment], spec: PixelSpec) -> list[list[NDArray[np.uint8]]]:
    """Return the pixels of each image input: of the image, or of its tiles, each (3, H, W).

    Raises:
        ImageError: an image is damaged, or too large.
    """
    inputs = [segment.image for segment in segments if isinstance(segment.image, ImageInput)]
    return [encoder_inputs(open_image(image.image), spec) for image in inputs]


def with_targets(
    sequence: TokenSequence,
    segments: Sequence[PromptSegment],
    drawing_size: tuple[int, int] | None,
    encoded: EncodedSpec | None = None,
) -> TokenSequence:
    """Return the sequence with the pixels of its image targets.

    Args:
        sequence: from `build_sequence`.
        segments: from which the sequence was built.
        drawing_size: height and width of image targets; None where the model has no generation path.
        encoded: the form of image targets that are given encoded; None where the generation path has none.

    Raises:
        ImageError: an image is damaged, or too large.
        PromptError: there is an image target, and the model has no generation path; or it is given encoded in
            another form than the path's.
    """
    targets = [segment.image for segment in segments if isinstance(segment.image, ImageTarget)]
    if targets and drawing_size is None:
        raise PromptError("there is an image to draw, and this model has no generation path.")
    height, width = drawing_size or (0, 0)
    return replace(
        sequence,
        generation_images=[
            generation_pixels(open_image(target.image), height=height, width=width)
            if target.image is not None
            else _checked(target.encoded, encoded)
            for target in targets
        ],
        generation_supervised=[image.supervised for image in targets],
    )


def _checked(encoded: Any, spec: EncodedSpec | None) -> NDArray[Any]:
    if spec is None:
        raise PromptError(
            "an image target is given encoded; expected the image itself: the model's generation path"
            " declares no form of encoded images, or the processor was loaded without its model"
        )
    try:
        return spec.checked(encoded)
    except ValueError as error:
        raise PromptError(f"an image target that is given encoded: {error}.") from error


def without_condition(sequence: TokenSequence, *, pad: int, hidden: bool = False) -> TokenSequence:
    """Return the sequence with pads before its first supervised image target, but for the first and last.

    What precedes the image is then what precedes it in the unconditional row of sampling; with ``hidden``, no
    position sees it but for the first. Nothing there is supervised, and the images there are dropped: image
    inputs, and targets that are given. A sequence without a supervised
    target has no condition, and is returned as it is.
    """
    if not any(sequence.generation_supervised):
        return sequence
    drawn = np.flatnonzero(sequence.generation_mask)
    earlier = sequence.generation_supervised.index(True)  # targets before it
    last = int(drawn[earlier * len(drawn) // len(sequence.generation_supervised)]) - 1  # begin-of-image
    tokens, labels = sequence.tokens.copy(), sequence.labels.copy()
    understanding_mask, generation_mask = sequence.understanding_mask.copy(), sequence.generation_mask.copy()
    dropped_images = sequence.inputs_before(last)
    position = np.arange(len(tokens))
    is_before = (position > 0) & (position <= last)
    tokens[1:last] = pad
    labels[:last] = IGNORE_INDEX
    understanding_mask[:last] = generation_mask[:last] = False
    return replace(
        sequence,
        tokens=tokens,
        labels=labels,
        understanding_mask=understanding_mask,
        generation_mask=generation_mask,
        understanding_pixels=sequence.understanding_pixels[dropped_images:],
        understanding_counts=sequence.input_counts[dropped_images:],
        generation_images=sequence.generation_images[earlier:],
        generation_supervised=sequence.generation_supervised[earlier:],
        together=None if sequence.together is None else sequence.together * understanding_mask,
        hidden=is_before if hidden and is_before.any() else None,
    )


def image_blocks(sequence: TokenSequence) -> NDArray[np.int64]:
    """Return the block (T,) of each position: the number of its image from 1, or 0 for what is not read."""
    blocks = np.zeros(len(sequence), np.int64)
    counts = sequence.input_counts
    blocks[sequence.understanding_mask] = np.repeat(np.arange(1, len(counts) + 1), counts)
    return blocks


def check_context_length(
    positions: int, context: int, *, reserved: int, image_tokens: int, source: str = ""
) -> None:
    """Check that the context holds a sequence of so many positions, and the ``reserved`` ones behind it.

    Raises:
        PromptError: the context is shorter.
    """
    if positions + reserved > context:
        image = f" and {reserved} for the image" if reserved else ""
        of_source = f" (source {printable(source)!r})" if source else ""
        raise PromptError(
            f"the sequence takes {positions:,} positions{image}; the context has {context:,}{of_source}."
            f" Shorten the text, or leave out images (up to {image_tokens + 2} positions for each that"
            " is read). A model that is trained for it may have a longer context"
            " (backbone.config.max_position_embeddings of the backbone hf)."
        )
