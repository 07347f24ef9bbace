"""What a run needs in memory, before it starts. Parameters are counted; activations are estimated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from janus_modular.model.batch import Batch
from janus_modular.model.model import JanusModel
from janus_modular.sequence import IGNORE_INDEX
from janus_modular.training.step_batches import Work

FULL = 4  # bytes of a float32


@dataclass(frozen=True)
class Memory:
    """Bytes that a run needs."""

    parameters: int  # all of them, in float32
    gradients: int  # of what learns
    optimizer: int  # AdamW's two averages for what learns
    activations: int  # kept for the backward pass; an estimate

    @property
    def total(self) -> int:
        """All together."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def estimate(model: JanusModel, work: Work | None = None, *, half: bool = False) -> Memory:
    """Count what parameters, gradients and AdamW take; estimate activations of the largest batch in ``work``.

    The estimate: every linear layer keeps what goes in and what comes out, once a
    position, in bfloat16 if ``half`` (a decoder layer of width D and intermediate I so keeps 11 D + 3 I
    numbers, near the count of Korthikanti et al. 2022, table 2, for attention that keeps no scores).
    Text logits are kept three times, in float32. What is frozen below all that learns keeps nothing.
    """
    everything = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = 0 if work is None else max(_kept(model, batch, 2 if half else FULL) for batch in work.batches)
    return Memory(FULL * everything, FULL * learns, 2 * FULL * learns, kept)


def _kept(model: JanusModel, batch: Batch, width: int) -> int:
    vocab = model.backbone.vocab_size
    positions = batch.tokens.numel()
    backbone = _per_position(model.backbone, skip=vocab) * positions  # type: ignore[arg-type]
    logits = 3 * FULL * vocab * int((batch.labels != IGNORE_INDEX).sum())
    seen = 0
    if batch.understanding_pixels is not None:
        features = len(batch.understanding_pixels) * model.understanding.num_tokens
        for part in (model.understanding.encoder, model.understanding.adaptor):
            seen += _per_position(part) * features  # type: ignore[arg-type]
    drawn = 0
    if batch.generation_pixels is not None:
        codes = len(batch.generation_pixels) * model.generation.num_tokens
        apart = tuple(f"{name}." for name in model.generation.frozen_submodules)
        drawn = _per_position(model.generation, apart=apart) * codes  # type: ignore[arg-type]
    return width * (backbone + seen + drawn) + logits


def _per_position(module: nn.Module, *, skip: int | None = None, apart: tuple[str, ...] = ()) -> int:
    """Add up the widths going in and out of linear layers; 0 where a gradient never comes.

    It comes to what learns, and to the backbone (``skip`` is its vocabulary) whether that learns or not:
    the adaptors are below it. What is trained ``apart``, generation's tokenizer, gets none.
    """
    named = module.named_modules()
    layers = [one for name, one in named if isinstance(one, nn.Linear) and not name.startswith(apart)]
    carries = any(p.requires_grad for p in module.parameters()) or skip is not None
    return sum(one.in_features + one.out_features for one in layers if one.out_features != skip) * carries
