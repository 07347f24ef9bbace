"""Labelled images: what a source must offer to be demonstrated on, and batches of its pixels."""

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
    """A source whose images have a class each, known by name."""

    images: Sequence[Image.Image]  # as they are, in order of their index
    labels: NDArray[np.int64]  # (len,) class of each
    names: Sequence[str]  # of the classes

    def __len__(self) -> int: ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index``, changed a little if it is to be learned from."""
        ...

    def prompt(self, label: int, rng: np.random.Generator) -> str:
        """Ask for a drawing of a class, in one of several ways."""
        ...


def image_in(sample: Sample) -> Image.Image:
    """Return the first image of a sample."""
    segments = (segment for message in sample.messages for segment in message.content)
    return next(one.image for one in segments if isinstance(one, ImageInput | ImageTarget))


def as_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Stack images of one size as (N, 3, H, W), uint8; channels last in memory: faster on CPUs."""
    stacked = np.stack([np.asarray(one.convert("RGB")) for one in images])  # (N, H, W, 3)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def batches(source: LabelledImages, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Yield pixels (size, 3, H, W) uint8, labels (size,) and prompts without end, drawn at random."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(source.labels)
    while True:
        chosen = rng.integers(len(source), size=size)
        pixels = as_pixels([image_in(source.sample(int(i), rng)) for i in chosen])
        prompts = [source.prompt(int(source.labels[i]), rng) for i in chosen]
        yield pixels, labels[chosen], prompts
