"""Drawing code by code with classifier-free guidance, as Janus does (paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import (
    CodeSamplerSettings,
    EncodedImages,
    EncodedSpec,
    ImageSampler,
    PromptError,
    Registry,
    Session,
    hookimpl,
    unconditional,
    without_encoded_images,
)
from janus_modular import Sequence as Prompt
from janus_plugins.samplers.limits import (
    MOST_GUIDANCE,
    check_codes,
    check_float,
    check_integer,
    check_integers,
    check_temperature,
)
from janus_plugins.samplers.noise import exponential_noise


@dataclass
class DrawSettings(CodeSamplerSettings):
    """How codes are sampled."""

    guidance: float = 5.0  # w in l = u + w (c - u); 1: no unconditional row
    temperature: float = 1.0  # 0: always the most likely code
    seed: int = 0  # of the noise of image i: (seed, i)
    image_guidance: float = 0.0  # v: weight of a row without the codes of given images; 0: no such row

    def __post_init__(self) -> None:
        """Check the settings: a wrong one would draw noise.

        Raises:
            PromptError: a setting is of another type, or out of its range.
        """
        expected = f"a number from {-MOST_GUIDANCE:,.0f} to {MOST_GUIDANCE:,.0f}; 1 is none"
        self.guidance = check_float(
            "guidance", self.guidance, expected, low=-MOST_GUIDANCE, high=MOST_GUIDANCE
        )
        self.temperature = check_temperature(self.temperature)
        self.image_guidance = check_float(
            "image_guidance", self.image_guidance, "a number from 0, which is none", low=0, high=MOST_GUIDANCE
        )
        self.seed = check_integer("seed", self.seed, "a whole number from 0", low=0)
        self.numbers = check_integers("numbers", self.numbers)
        self.first = check_integer("first", self.first, "a whole number from 0", low=0)
        self.prefix = check_codes("prefix", self.prefix)


def draw(
    session: Session, prompts: Sequence[Prompt], settings: DrawSettings
) -> Generator[tuple[int, int], None, EncodedImages]:
    """Yield the number of codes drawn so far, and of all; return the images (N, 3, H, W), and their codes.

    Prompts end where the image begins. With guidance every image has two rows, which get the same code; all
    conditional rows come first. An image has noise of its own, so that it does not depend on other images.

    All codes of a prefix are read at once. The noise of the others is what it would be without the prefix.
    """
    prefix = checked_prefix(session, settings.prefix)  # (k,) or (k, S)
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    noise = np.ones((len(prompts), session.sizes["codes"]), np.float32)
    greedy = settings.temperature == 0
    guidance, temperature = np.float32(settings.guidance), np.float32(1 if greedy else settings.temperature)
    rows = list(prompts)
    scalars = [guidance, temperature]
    if session.sizes.get("image_guidance"):
        scalars.append(np.float32(settings.image_guidance))
    if settings.image_guidance:
        check_image_guidance(session, prompts)
        rows += [without_encoded_images(prompt, session.pad_id) for prompt in prompts]
    if settings.guidance != 1 or settings.image_guidance:
        rows += [unconditional(prompt, session.pad_id) for prompt in prompts]

    hidden = read_prompts(session, rows, prefix)
    codes = []
    steps = session.image_positions
    for step in range(1, steps + 1):
        if not greedy:
            noise = exponential_noise(rngs, noise.shape[1])
        if step <= len(prefix):
            continue
        chosen, x = session.run("sample_image", hidden, noise, *scalars)
        codes.append(chosen)
        yield step, steps
        if step < steps:
            hidden = session.step(x)
    drawn = session.to_host(session.stack(codes))  # (N, P - k), or (N, P - k, S)
    if len(prefix):
        drawn = np.concatenate([np.stack([prefix] * len(prompts)), drawn], axis=1)
    return EncodedImages(session.to_host(session.run("decode_image", drawn)), drawn)


def check_image_guidance(session: Session, prompts: Sequence[Prompt]) -> None:
    """Check that the model draws with a third row, and that it would differ from the first.

    Raises:
        PromptError: the model does not, or a prompt has no image that is given encoded.
    """
    if not session.sizes.get("image_guidance"):
        raise PromptError(
            "image_guidance: found a weight, and a model that draws with two rows; expected 0, or a model"
            " whose config has generation.image_guidance=true: janus-modular convert MODEL FOLDER"
            " generation.image_guidance=true"
        )
    if not all(prompt.generation_images for prompt in prompts):
        raise PromptError(
            "image_guidance: found a prompt without an image that is given encoded; expected one, which the"
            " third row leaves out (image_form encoded or both)."
        )


def read_prompts(session: Session, rows: Sequence[Prompt], prefix: NDArray[np.int64]) -> Any:
    """Read prompts, and the codes (k,) or (k, S) that follow each; return the last hidden states (R, D).

    Raises:
        BundleError: there are codes, and the bundle is of an earlier version, which cannot embed them.
    """
    if not len(prefix):
        return session.prefill(rows)
    embeddings = session.run("embed_codes", np.stack([prefix] * len(rows)))  # (R, k, D)
    session.prefill(rows)
    hidden = session.extend(embeddings)  # (R, k, D)
    return session.take(hidden, np.arange(1, len(rows) + 1) * len(prefix) - 1)


def checked_prefix(session: Session, prefix: Sequence[Any]) -> NDArray[np.int64]:
    """Return a prefix of k codes as (k,) or (k, S).

    Raises:
        PromptError: the prefix is longer than an image, or its codes are not those of the model's tokenizer.
    """
    codebooks = session.sizes.get("codebooks")
    if not len(prefix):
        return np.empty(0, np.int64)
    if not codebooks:
        raise PromptError(
            "prefix: the bundle does not say how many codes its image tokenizer has; expected a bundle of"
            " this version: export the model again."
        )
    several = codebooks[1:] and [len(codebooks)]
    spec = EncodedSpec((len(prefix), *several), ids=tuple(codebooks))
    try:
        codes = spec.checked(np.array(prefix))
    except ValueError as error:
        raise PromptError(f"prefix: {error}.") from error
    if len(prefix) >= session.image_positions:
        raise PromptError(
            f"prefix: found {len(prefix)} codes; expected fewer than the {session.image_positions} of an"
            " image."
        )
    return codes


@hookimpl
def register_image_samplers(registry: Registry[ImageSampler[Any]]) -> None:
    """Register ``autoregressive``."""
    registry.add("autoregressive", draw, DrawSettings)
