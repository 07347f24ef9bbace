"""The Janus model: one transformer and a path for each direction of images; every component is a plugin.

pixels ──> understanding (encoder, adaptor) ──┐                         ┌──> text logits
tokens ──> backbone.embed ────────────────────┼──> merge ──> backbone ──┤
codes  ──> generation (tokenizer, adaptor) ───┘                         └──> generation.head ──> image logits
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from janus_modular.capabilities import (
    AlignsHiddenStates,
    DeclaresPositions,
    EncodesImages,
    MasksPositions,
    ReturnsLayer,
)
from janus_modular.config import component_specs, module_path
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import ConfigError, PromptError
from janus_modular.interfaces import Backbone, GenerationPath
from janus_modular.model.batch import Batch
from janus_modular.model.sampling import mark_not_finite, sample_with_noise, top_k_top_p_filter
from janus_modular.model.understanding import Understanding
from janus_modular.sequence import IGNORE_INDEX

MAX_LOGITS = 2**27
"""Text logits that are in memory at once, 512 MB in float32; further ones are computed again in backward."""


@dataclass
class Output:
    """The result of a forward pass."""

    hidden: Tensor  # (B, T, D)
    losses: dict[str, Tensor] = field(default_factory=dict)  # by name: (M,), at supervised positions
    sources: dict[str, Tensor] = field(default_factory=dict)  # (M,) the losses' indices into batch.sources


class JanusModel(nn.Module):
    """The whole model. Batches of text alone run neither image path."""

    def __init__(
        self,
        understanding: Understanding,
        generation: GenerationPath,
        backbone: Backbone,
        config: ModelConfig,
    ) -> None:
        super().__init__()
        self.understanding = understanding
        self.generation = generation
        self.backbone = backbone
        self.config = config
        self._check_alignment()

    def components(self) -> dict[str, nn.Module]:
        """Return the module of each component in the config, by its name in the model: ``backbone``."""
        names = [module_path(path) for path, _ in component_specs(self.config)]
        return {name: self.get_submodule(name) for name in names}

    @property
    def text_sampler(self) -> str:
        """The registered text sampler that answers."""
        return self.config.text_sampler

    @property
    def image_sampler(self) -> str:
        """The registered image sampler that draws: the config's, or else the generation path's."""
        return self.config.image_sampler or self.generation.image_sampler

    def forward(self, batch: Batch) -> Output:
        """Run a batch; return the losses at all supervised positions."""
        targets = self.targets(batch)
        x = self.embed(batch, targets)  # (B, T, D)
        x, states = self.hidden(x, batch, None if targets is None else self.align_layer)
        output = Output(hidden=x)
        self._text_loss(output, batch)
        if targets is not None:
            losses = dict(self.generation.losses(self._at_images(x, batch), targets))
            if states is not None:
                losses |= self._alignment(self._at_images(states, batch, aligned=True), batch)
            self._drawing_losses(output, batch, losses)
        return output

    def targets(self, batch: Batch) -> Any:
        """Return what is to be predicted of a batch's target images, in their order; None without any.

        Raises:
            PromptError: an image is given encoded, and the generation path declares no such form.
        """
        pixels, encoded, is_encoded = batch.generation_pixels, batch.generation_encoded, batch.is_encoded
        if encoded is not None and not isinstance(self.generation, EncodesImages):
            raise PromptError(
                f"the batch has {len(encoded)} images that are given encoded; the generation path"
                f" {type(self.generation).__name__} declares no `encoded`: give the images themselves"
            )
        with torch.autocast(batch.tokens.device.type, enabled=False):  # half precision would change codes
            targets = None if pixels is None else self.generation.targets(pixels, batch.image_rngs())
        if encoded is None or targets is None:
            return targets if encoded is None else encoded
        joined = encoded.new_empty(len(cast(Tensor, is_encoded)), *encoded.shape[1:])
        joined[is_encoded] = encoded
        joined[~cast(Tensor, is_encoded)] = targets
        return joined

    def hidden(self, x: Tensor, batch: Batch, layer: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states (B, T, D) of a batch's embeddings, and those after a layer.

        Raises:
            PromptError: the batch was made by the processor of another model.
        """
        positions, together = self.positions(batch), batch.together
        if together is not None and not self.config.together:
            raise PromptError(
                "the batch has positions that attend to each other; expected none: the model is causal"
                " (`together` of its config). Build the batch with this model's own processor."
            )
        if together is None and self.config.together and batch.understanding_mask.any():
            raise PromptError(
                "the batch has images and no `together`; expected the positions that attend to each other."
                " Build the batch with this model's own processor."
            )
        masks = isinstance(self.backbone, MasksPositions) and self.backbone.masks_positions
        if batch.hidden is not None and not masks:
            raise PromptError(
                "the batch has a dropped condition that no position may see; the backbone"
                f" {type(self.backbone).__name__}, as configured, cannot hide positions"
                " (`janus_modular.MasksPositions`): choose another, or condition_dropout=0"
            )
        options = {"together": together, "hidden": batch.hidden, "layer": layer}
        chosen = {name: value for name, value in options.items() if value is not None}
        hidden = cast(Any, self.backbone)(x, positions=positions, **chosen)
        return (hidden, None) if layer is None else hidden

    def positions(self, batch: Batch) -> Tensor:
        """Return the positions of a batch as the backbone takes them: (B, T), or (1 + P, B, T).

        Raises:
            PromptError: the batch has images without position ids, or ids that the backbone does not have.
        """
        axes = position_axes(self.backbone)
        ids = batch.position_ids
        if (0 if ids is None else len(ids)) != axes and (ids is not None or batch.understanding_mask.any()):
            raise PromptError(
                f"the batch has position ids on {0 if ids is None else len(ids)} axes; expected {axes}, which"
                " the backbone has: was it made by this model's own processor?"
            )
        return stack_positions(self.backbone, batch.positions, ids)

    def embed(self, batch: Batch, targets: Any = None) -> Tensor:
        """Return the embeddings (B, T, D) of a batch's text, input images and target images."""
        x = self.backbone.embed(batch.tokens)
        if batch.understanding_pixels is not None:
            features = self.understanding.embed(batch.understanding_pixels)[None]  # (1, M, D)
            check_feature_count(
                batch.understanding_mask, features, "read", images=len(batch.understanding_pixels)
            )
            x = merge_features(features, x, mask=batch.understanding_mask)
        if targets is None:
            targets = self.targets(batch)
        if targets is not None:
            features = self.generation.embed(targets)
            check_feature_count(batch.generation_mask, features, "drawn", images=len(features))
            x = merge_features(features, x, mask=batch.generation_mask)
        for path, runs in sorted(batch.idle.items()):
            for _ in range(runs):
                x = x + 0 * self._idle_features(path, x)
        return x

    def _idle_features(self, path: str, x: Tensor) -> Tensor:
        """Return the sum of a path's embeddings of a black image, for the gradients that others compute."""
        is_read = path == "understanding"
        size: Any = self.understanding.encoder.pixels if is_read else self.generation
        pixels = torch.zeros(1, 3, size.height, size.width, dtype=torch.uint8, device=x.device)
        if is_read:
            return self.understanding(pixels).sum()
        targets = self.generation.targets(pixels, [np.random.default_rng(0)])
        features = self.generation.embed(targets)
        losses = dict(self.generation.losses(features, targets))
        if isinstance(self.generation, AlignsHiddenStates) and self.align_layer is not None:
            with torch.no_grad():
                of_image = self.understanding.encoder(self.understanding.normalize(pixels))
            losses |= self.generation.alignment(features, of_image)
        return features.sum() + torch.stack([loss.sum() for loss in losses.values()]).sum()

    def sample_text(
        self,
        hidden: Tensor,
        noise: Tensor,
        temperature: Tensor,
        top_k: Tensor | int,
        top_p: Tensor | float,
        suppressed_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Choose the next token of each row (R, D); return ids (R,) and their embeddings (R, D).

        ``noise`` (R, V) of Exp(1), or ones for the most likely; ``suppressed_ids`` (F,) ids are never chosen.
        """
        logits = self.backbone.logits(hidden).float() / temperature  # (R, V)
        if suppressed_ids.numel():  # not every runtime can scatter an empty list
            logits = logits.index_fill(-1, suppressed_ids, float("-inf"))
        all_logits = logits
        if not (isinstance(top_k, int) and top_k == 0 and isinstance(top_p, float) and top_p == 1):
            logits = top_k_top_p_filter(logits, top_k, top_p)
        ids = sample_with_noise(logits, noise)
        return mark_not_finite(ids, all_logits), self.backbone.embed(ids.unsqueeze(1)).squeeze(1)

    def _text_loss(self, output: Output, batch: Batch) -> None:
        supervised = batch.labels != IGNORE_INDEX
        if supervised.any():
            output.losses["text"] = self.text_losses(output.hidden[supervised], batch.labels[supervised])
            if batch.label_source is not None:
                output.sources["text"] = batch.label_source[supervised]

    def text_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropies (M,) of tokens, for the hidden states before them (M, D).

        Logits beyond `MAX_LOGITS` are computed in chunks, and again in the backward pass.
        """
        count = max(1, MAX_LOGITS // self.backbone.vocab_size)
        if len(labels) <= count:
            return self._text_losses(hidden, labels)
        chunks = zip(hidden.split(count), labels.split(count), strict=True)
        return torch.cat([checkpoint(self._text_losses, *chunk, use_reentrant=False) for chunk in chunks])

    def _text_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.backbone.logits(hidden).float()  # (M, V)
        return F.cross_entropy(logits, labels, reduction="none")

    @property
    def align_layer(self) -> int | None:
        """The layer whose hidden states the generation path aligns with features; None without one."""
        return self.generation.align_layer if isinstance(self.generation, AlignsHiddenStates) else None

    def _at_images(self, x: Tensor, batch: Batch, *, aligned: bool = False) -> Tensor:
        """Return the states (N, num_tokens, D) of target images: those that predict them, or ``aligned``."""
        mask = batch.generation_mask
        if self.generation.predicts_next and not aligned:
            mask = mask.roll(-1, dims=1)
        return x[mask].view(-1, self.generation.num_tokens, x.shape[-1])

    def _alignment(self, states: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Return the losses between states (N, num_tokens, D) and the features of the images.

        Raises:
            PromptError: an image is given encoded, so that it has no features.
        """
        pixels = batch.generation_pixels
        if pixels is None or len(pixels) < len(states):
            raise PromptError(
                f"the batch has {len(states)} target images, of which"
                f" {len(states) - (0 if pixels is None else len(pixels))} are given encoded; expected pixels"
                f" of all, whose features are aligned with layer {self.align_layer}"
            )
        with torch.no_grad():
            features = self.understanding.encoder(self.understanding.normalize(pixels))  # (N, P, C)
        return cast(AlignsHiddenStates, self.generation).alignment(states, features)

    def _check_alignment(self) -> None:
        """Check that hidden states can be aligned with features, if the generation path does.

        Raises:
            ConfigError: the backbone returns no such layer, or the encoder's images have another size.
        """
        layer, pixels = self.align_layer, self.understanding.encoder.pixels
        if layer is None:
            return
        layers = self.backbone.num_layers if isinstance(self.backbone, ReturnsLayer) else 0
        if not 1 <= layer <= layers:
            raise ConfigError(
                f"generation: found align_layer {layer}; expected 1 to {layers}, the layers that the backbone"
                f" {type(self.backbone).__name__} returns. Choose another layer, or null."
            )
        grid = self.understanding.encoder.grid(pixels.height, pixels.width)
        actual = (pixels.height, pixels.width, grid[0] * grid[1], self.understanding.encoder.feature_dim)
        path = cast(AlignsHiddenStates, self.generation)
        expected = (path.height, path.width, *path.align_shape)
        if actual != expected:
            raise ConfigError(
                f"generation: found align_layer {layer}, and an understanding encoder of (height, width,"
                f" features, their dimension) {actual}; expected {expected}, those of drawings, their patches"
                " and align_dim: the loss reads the encoder's features of the image. Change them, or"
                " align_layer=null."
            )

    def _drawing_losses(self, output: Output, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        supervised, positions = cast(Tensor, batch.generation_supervised), self.generation.num_tokens
        for name, loss in losses.items():  # (N, P), or (N,)
            if loss.ndim == 1:  # the loss of an image counts as that of each of its positions
                loss = loss[:, None].expand(len(loss), positions)
            output.losses[name] = loss[supervised].flatten()
            if batch.image_source is not None:
                output.sources[name] = batch.image_source[supervised].repeat_interleave(loss.shape[1])


def position_axes(backbone: Backbone) -> int:
    """Return the number P of axes on which a backbone's positions have ids, beside their index."""
    return len(backbone.position_axes) if isinstance(backbone, DeclaresPositions) else 0


def stack_positions(backbone: Backbone, positions: Tensor, ids: Tensor | None = None) -> Tensor:
    """Return positions (B, T) as a backbone takes them: with ids (P, B, T) where it declares axes of ids.

    None: ids count like positions, as those of text do.
    """
    axes = position_axes(backbone)
    if not axes:
        return positions
    return torch.cat([positions[None], positions.expand(axes, *positions.shape) if ids is None else ids])


def check_feature_count(mask: Tensor, features: Tensor, verb: str, *, images: int) -> None:
    """Raise PromptError unless ``mask`` (B, T) has a position for each of the images' features (N, P, D)."""
    count = features.shape[0] * features.shape[1]
    if not torch.compiler.is_exporting() and (positions := int(mask.sum())) != count:
        raise PromptError(
            f"the batch has {positions} positions for images that are {verb}, but its {images} images have"
            f" {count} features: was it made by this model's own processor?"
        )


def merge_features(features: Tensor, x: Tensor, *, mask: Tensor) -> Tensor:
    """Return x (B, T, D) with features (N, P, D), in order, where ``mask`` (B, T) is True.

    A gather and a select rather than ``x[mask] = features``: ``x`` is not changed, and no shape depends on
    data, so that ONNX and TensorRT can compile it.
    """
    index = (mask.flatten().cumsum(0) - 1).clamp(min=0)  # (B*T,)
    rows = features.flatten(0, 1)[index].view_as(x)  # (B, T, D)
    return torch.where(mask.unsqueeze(-1), rows.to(x.dtype), x)
