"""Images and captions of samples, as objectives read them that train a component alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from janus_modular.errors import DataError, UnsupervisedError
from janus_modular.processing.image_transforms import generation_pixels, understanding_pixels
from janus_modular.processing.processor import Processor
from janus_modular.processing.text_tokenizer import TextSpan
from janus_modular.sequence import ImageInput, ImageTarget, Sample, Text


def image_of(sample: Sample, rng: np.random.Generator) -> Image.Image:
    """Return an image of a sample; of several, a random one.

    Raises:
        UnsupervisedError: it has none.
    """
    images = [
        segment.image
        for message in sample.messages
        for segment in message.content
        if isinstance(segment, ImageInput | ImageTarget) and segment.image is not None
    ]
    if not images:
        raise UnsupervisedError("there is no image in it; expected one: choose sources of images.")
    return images[int(rng.integers(len(images)))] if len(images) > 1 else images[0]


def captioned_image_of(sample: Sample) -> tuple[Image.Image, str]:
    """Return the image of a sample, and its caption.

    The caption of an image target is the text before and after it; that of an image input is the supervised
    text (the answer, not the question), or all text where none is marked.

    Raises:
        DataError: it has several images, or an encoded image.
        UnsupervisedError: it has no image, or no text.
    """
    segments = [segment for message in sample.messages for segment in message.content]
    images = [segment for segment in segments if isinstance(segment, ImageInput | ImageTarget)]
    texts = [segment for segment in segments if isinstance(segment, Text)]
    if len(images) > 1:
        raise DataError(f"there are {len(images)} images in it; expected one, with a caption.")
    if images and images[0].image is None:
        raise DataError("its image is given encoded; expected the image itself.")
    if images and isinstance(images[0], ImageInput):
        answers = [
            segment
            for message in sample.messages
            for segment in message.content
            if isinstance(segment, Text) and (segment.supervised or message.role == "assistant")
        ]
        texts = answers or texts
    caption = " ".join(text.text.strip() for text in texts if text.text.strip())
    if not images or images[0].image is None or not caption:
        missing = "caption" if images else "image"
        raise UnsupervisedError(f"there is no {missing} in it; expected an image with a caption.")
    return images[0].image, caption


def target_pixels(image: Image.Image, processor: Processor) -> NDArray[np.uint8]:
    """Return the pixels (3, height, width) of an image, as of an image target of the model."""
    if processor.drawing is None:
        raise DataError("the model has no generation path, whose size its images would have.")
    return generation_pixels(
        image.convert("RGB"), height=processor.drawing.height, width=processor.drawing.width
    )


def input_pixels(image: Image.Image, processor: Processor) -> NDArray[np.uint8]:
    """Return the pixels (3, H, W) of an image, as of an image input of the model."""
    return understanding_pixels(image.convert("RGB"), processor.pixels)


def caption_ids(caption: str, processor: Processor) -> NDArray[np.int64]:
    """Return the token ids (T,) of a caption, without special tokens."""
    return processor.tokenizer.encode([TextSpan(caption)]).ids
