"""Labelled images: the interface of a source that the demo can use, and batches of its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from janus_modular.sequence import ImageInput, ImageTarget, Sample


class LabelledImages(Protocol):
    """A source whose images have one class each, known by name."""

    images: Sequence[Image.Image]  # without augmentation, by index
    labels: NDArray[np.int64]  # (len,) class of each image
    names: Sequence[str]  # of the classes

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index``; training samples are augmented."""
        ...

    def prompt(self, label: int, rng: np.random.Generator) -> str:
        """Return one of several prompts for a drawing of a class."""
        ...


def first_image(sample: Sample) -> Image.Image:
    """Return the first image of a sample."""
    segments = (segment for message in sample.messages for segment in message.content)
    images = (segment.image for segment in segments if isinstance(segment, ImageInput | ImageTarget))
    return next(image for image in images if image is not None)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Return images of one size as (N, 3, H, W), uint8, channels last in memory, which is faster on CPUs."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (N, H, W, 3)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def batches(source: LabelledImages, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixels (size, 3, H, W) uint8 and labels (size,) without end, sampled at random."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(source.labels)
    while True:
        indices = rng.integers(len(source), size=size)
        pixels = to_pixels([first_image(source.sample(int(i), rng)) for i in indices])
        yield pixels, labels[indices]
