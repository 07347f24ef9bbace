"""The log-probability of images that are given encoded: of a policy's own drawings, for its gradient."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
from torch import Tensor

from janus_modular.capabilities import EncodesImages, HasLogProbabilities
from janus_modular.continuing import with_image
from janus_modular.errors import ConfigError, PromptError
from janus_modular.model.batch import collate
from janus_modular.model.model import JanusModel
from janus_modular.sequence import Sequence, unconditional


def image_log_probabilities(
    model: JanusModel,
    prompts: Many[Sequence],
    encoded: Many[Any],
    *,
    pad_id: int,
    guidance: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-probabilities (N, P) of encoded images, one after each prompt, with gradients.

    A prompt ends where its image begins (`Processor.draw_prompt`). All images run in one batch, with guidance
    in two rows each: where memory is short, call it with fewer images.

    Raises:
        ConfigError: the generation path gives no log-probabilities.
        PromptError: there are not as many prompts as images, an image is not in the path's form, or
            temperature is 0, at which the most likely code has probability 1.
    """
    path = model.generation
    if not (isinstance(path, EncodesImages) and isinstance(path, HasLogProbabilities)):
        raise ConfigError(
            f"the generation path {type(path).__name__} gives no log-probabilities; expected one with"
            " `encoded` and log_probabilities()"
        )
    if len(prompts) != len(encoded) or not len(prompts):
        raise PromptError(f"found {len(prompts)} prompts and {len(encoded)} images; expected one for each.")
    if not (np.isfinite(temperature) and temperature > 0 and np.isfinite(guidance)):
        raise PromptError(
            f"found temperature {temperature} and guidance {guidance}; expected a temperature above 0 and a"
            " finite guidance."
        )
    try:
        images = [path.encoded.checked(image) for image in encoded]
    except ValueError as error:
        raise PromptError(f"encoded: {error}.") from error
    rows = list(prompts)
    if guidance != 1:
        rows += [unconditional(prompt, pad_id) for prompt in prompts]
    sequences = [
        with_image(prompt, image, path.num_tokens)
        for prompt, image in zip(rows, images * (len(rows) // len(images)), strict=True)
    ]
    batch = collate(sequences).to(next(model.parameters()).device)
    targets = model.targets(batch)
    hidden, _ = model.hidden(model.embed(batch, targets), batch)  # (R, T, D)
    mask = batch.generation_mask.roll(-1, dims=1) if path.predicts_next else batch.generation_mask
    before = hidden[mask].view(len(rows), path.num_tokens, hidden.shape[-1])  # (R, P, D)
    return path.log_probabilities(before, targets[: len(images)], guidance=guidance, temperature=temperature)
