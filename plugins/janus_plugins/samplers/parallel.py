"""Drawing several codes in a pass: a Jacobi iteration with the noise held fixed.

Sampling with given noise makes the next code a function of the codes before it, so that an image of P codes
is the one fixed point of P equations. Passes over a window of drafts reach it from the left: the image is
that of drawing code by code (Wiggers & Hoogeboom 2020, arXiv 2002.09928; Song et al. 2021, arXiv 2002.03629;
Teng et al. 2024, arXiv 2410.01699).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import numpy as np

from janus_modular import (
    EncodedImages,
    ImageSampler,
    PromptError,
    Registry,
    Session,
    hookimpl,
)
from janus_modular import Sequence as Prompt
from janus_plugins.samplers.autoregressive import DrawSettings, checked_prefix, guided_rows, read_prompts
from janus_plugins.samplers.drafts import Integers, NoiseWindow, check_session, confirmed, read_vectors
from janus_plugins.samplers.limits import check_integer

Drafts = Literal["above", "left"]


@dataclass
class ParallelSettings(DrawSettings):
    """How codes are sampled, and how many at once. Images depend on the settings of `DrawSettings` alone."""

    window: int = 4  # positions of an image in a pass: its last known code, and drafts of the next ones
    drafts: Drafts = "above"  # the first draft of a code: the code above it, or the one to its left

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            PromptError: a setting is of another type, or out of its range.
        """
        super().__post_init__()
        self.window = check_integer("window", self.window, "a whole number from 1", low=1)
        if self.drafts not in get_args(Drafts):
            raise PromptError(f"drafts: found {self.drafts!r:.60}; expected 'above' or 'left'.")


def draw(
    session: Session, prompts: Sequence[Prompt], settings: ParallelSettings
) -> Generator[tuple[int, int], None, EncodedImages]:
    """Yield the number of codes that every image has, and of all; return the images, and their codes.

    Prompts, rows, noise and codes are those of the sampler ``autoregressive``. A pass of the backbone reads
    the last known code of each image and drafts of the next ones, and takes every image as far as its drafts
    are right, by one code at least. What it chooses behind a wrong draft is the next draft there.
    """
    distance = draft_distance(session, settings)
    prefix = checked_prefix(session, settings.prefix)  # (k,) or (k, S)
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    noise = NoiseWindow(rngs, session.sizes["codes"], greedy=settings.temperature == 0)
    rows, scalars = guided_rows(session, prompts, settings)
    per_image = len(rows) // len(prompts)
    images = DraftedImages(session, len(prompts), prefix, distance)
    steps = session.image_positions

    def sample(hidden: Any, vectors: Integers, counts: Integers) -> Integers:
        """Return codes (N, W) or (N, W, S) behind states of images' conditional rows (N, W)."""
        of_block = prod(hidden.shape[:-1]) // per_image
        of_rows = np.arange(per_image)[:, None] * of_block + vectors.reshape(-1)
        of_window = noise.read(images.known, counts, vectors.shape[1]).reshape(vectors.size, -1)
        states = session.take(hidden, of_rows.reshape(-1))
        chosen, _ = session.run("sample_image", states, of_window, *scalars)
        codes: Integers = session.to_host(chosen)
        return codes.reshape(*vectors.shape, *codes.shape[1:])

    hidden = read_prompts(session, rows, prefix)
    single = np.ones(len(prompts), np.int64)
    images.take_over(sample(hidden, np.arange(len(prompts))[:, None], single), single, single)
    yield int(images.known.min()), steps
    while images.known.min() < steps:
        fed, counts = images.window(settings.window)  # (N, W) or (N, W, S), and (N,)
        before = session.lengths
        x = session.run("embed_codes", np.concatenate([fed] * per_image))
        hidden = session.extend(x, np.tile(counts, per_image))  # (R, W, D)
        chosen = sample(hidden, read_vectors(counts, fed.shape[1]), counts)
        right = confirmed(fed[:, 1:], chosen, counts)
        session.truncate(before + np.tile(right, per_image))
        images.take_over(chosen, counts, right)
        yield int(images.known.min()), steps
    return EncodedImages(session.to_host(session.run("decode_image", images.codes)), images.codes)


class DraftedImages:
    """Codes of images, known up to a position and drafted behind it."""

    def __init__(self, session: Session, count: int, prefix: Integers, distance: int) -> None:
        """Begin ``count`` images with a prefix (k,) or (k, S).

        A first draft is the code ``distance`` positions before it, or the last one in the first row.
        """
        codebooks = session.sizes["codebooks"]
        several = codebooks[1:] and [len(codebooks)]
        self.codes = np.zeros((count, session.image_positions, *several), np.int64)  # (N, P) or (N, P, S)
        if len(prefix):
            self.codes[:, : len(prefix)] = prefix
        self.known = np.full(count, len(prefix), np.int64)
        self.drafted = self.known.copy()  # known codes and drafts
        self.distance = distance

    def window(self, most: int) -> tuple[Integers, Integers]:
        """Return the last known code of each image and drafts behind it (N, W), and their numbers (N,)."""
        counts = np.minimum(most, self.codes.shape[1] - self.known)
        num_positions = int(counts.max())
        for image, end in enumerate((self.known + counts - 1).tolist()):
            for position in range(int(self.drafted[image]), end):
                source = position - (self.distance if position >= self.distance else 1)
                self.codes[image, position] = self.codes[image, source]
        self.drafted = np.maximum(self.drafted, self.known + counts - 1)
        positions = np.minimum(self.known[:, None] - 1 + np.arange(num_positions), self.codes.shape[1] - 1)
        return self.codes[np.arange(len(positions))[:, None], positions], counts

    def take_over(self, chosen: Integers, counts: Integers, right: Integers) -> None:
        """Take over the codes that a pass chose (N, W): ``right`` (N,) of them, and drafts behind these."""
        for image, (start, count) in enumerate(zip(self.known.tolist(), counts.tolist(), strict=True)):
            self.codes[image, start : start + count] = chosen[image, :count]
        self.drafted = np.maximum(self.drafted, self.known + counts)
        self.known = self.known + right


def draft_distance(session: Session, settings: ParallelSettings) -> int:
    """Return how many positions before a code its first draft lies.

    Raises:
        PromptError: the session's model does not draw code by code, cannot drop positions, takes no such
            window, or does not say how its codes lie in the image.
    """
    check_session(session, "parallel", "autoregressive", settings.window)
    if "codebooks" not in session.sizes:
        raise PromptError(
            f"the sampler 'parallel' draws codes; found a model whose sizes are {', '.join(session.sizes)};"
            " expected 'codebooks'. Choose the sampler of its generation path; if it is a bundle of Janus'"
            " path, export the model again."
        )
    if settings.drafts == "left":
        return 1
    if "grid" not in session.sizes:
        raise PromptError(
            "drafts: found 'above', and a bundle that does not say how codes lie in its images; expected one"
            " of this version: export the model again, or set drafts=left, which takes more passes."
        )
    width: int = session.sizes["grid"][1]
    return width


@hookimpl
def register_image_samplers(registry: Registry[ImageSampler[Any]]) -> None:
    """Register ``parallel``."""
    registry.add("parallel", draw, ParallelSettings)
