"""Janus: one transformer, two ways for images. The routing lives here; every part is somebody's plugin.

pixels ──> understanding (encoder, adaptor) ──┐                         ┌──> text logits
tokens ──> backbone.embed ────────────────────┼──> merge ──> backbone ──┤
codes  ──> generation (tokenizer, adaptor) ───┘                         └──> generation.head ──> image logits
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular.config import component_specs, module_path
from janus_modular.config.schema import ModelConfig
from janus_modular.errors import PromptError
from janus_modular.interfaces import Adaptor, Backbone, GenerationPath, UnderstandingEncoder
from janus_modular.model.batch import Batch
from janus_modular.model.sampling import mark_not_finite, sample_with_noise, top_k_top_p_filter
from janus_modular.sequence import IGNORE_INDEX


@dataclass
class Output:
    """What a forward pass leaves behind."""

    hidden: Tensor  # (B, T, D)
    losses: dict[str, Tensor] = field(default_factory=dict)  # by name: (M,), one for each supervised position
    sources: dict[str, Tensor] = field(
        default_factory=dict
    )  # by the same names: (M,) indices into batch.sources


class Understanding(nn.Module):
    """The path of images that are read: normalise, encode, adapt."""

    def __init__(self, encoder: UnderstandingEncoder, adaptor: Adaptor) -> None:
        super().__init__()
        self.encoder = encoder
        self.adaptor = adaptor
        spec = encoder.pixels
        grid = encoder.grid(spec.height, spec.width)
        if min(grid) < 1:
            raise ValueError(
                f"the encoder has {grid[0]}x{grid[1]} features of an image of {spec.height}x{spec.width}"
                " pixels; expected at least 1x1: give it larger pixels"
            )
        self.num_tokens = adaptor.num_tokens(grid)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Bring pixels (N, 3, H, W), uint8 or in [0, 1], to what the encoder was trained on."""
        spec = self.encoder.pixels
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        if spec.normalize:
            mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (spec.mean, spec.std))
            x = (x - mean) / std
        return x.to(next(self.parameters()).dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """Read images (N, 3, H, W) as embeddings (N, P, D)."""
        features = self.encoder(self.normalize(pixels))  # (N, P, C)
        return self.adaptor(features, self.encoder.grid(*pixels.shape[-2:]))


class JanusModel(nn.Module):
    """The whole model. Text-only batches run neither visual path."""

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
        """Run a batch and take the losses of all that is supervised in it."""
        with torch.autocast(batch.tokens.device.type, enabled=False):  # half precision would change codes
            pixels = batch.generation_pixels
            targets = None if pixels is None else self.generation.targets(pixels, batch.image_rngs())
        x = self.embed(batch, targets)  # (B, T, D)
        x = self.backbone(x, positions=batch.positions)  # (B, T, D)
        output = Output(hidden=x)
        self._text_loss(output, batch)
        if targets is not None:
            self._drawing_losses(output, batch, targets)
        return output

    def embed(self, batch: Batch, targets: Any = None) -> Tensor:
        """Splice words, images to read and images to draw into one sequence (B, T, D)."""
        x = self.backbone.embed(batch.tokens)
        if batch.understanding_pixels is not None:
            features = self.understanding(batch.understanding_pixels)
            x = merge_features(
                features, x, at=check_feature_count(batch.understanding_mask, features, "read")
            )
        if batch.generation_pixels is not None:
            if targets is None:
                targets = self.generation.targets(batch.generation_pixels, batch.image_rngs())
            features = self.generation.embed(targets)
            x = merge_features(features, x, at=check_feature_count(batch.generation_mask, features, "drawn"))
        return x

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

        ``noise`` (R, V) of Exp(1), or ones for the likeliest; ``suppressed_ids`` (F,) ids are never chosen.
        """
        logits = self.backbone.logits(hidden).float() / temperature  # (R, V)
        if suppressed_ids.numel():  # a graph would scatter an empty list, which not every runtime takes
            logits = logits.index_fill(-1, suppressed_ids, float("-inf"))
        all_logits = logits
        if not (isinstance(top_k, int) and top_k == 0 and isinstance(top_p, float) and top_p == 1):
            logits = top_k_top_p_filter(logits, top_k, top_p)
        ids = sample_with_noise(logits, noise)
        return mark_not_finite(ids, all_logits), self.backbone.embed(ids.unsqueeze(1)).squeeze(1)

    def _text_loss(self, output: Output, batch: Batch) -> None:
        supervised = batch.labels != IGNORE_INDEX
        if supervised.any():
            logits = self.backbone.logits(output.hidden[supervised]).float()  # (M, V)
            output.losses["text"] = F.cross_entropy(logits, batch.labels[supervised], reduction="none")
            if batch.label_source is not None:
                output.sources["text"] = batch.label_source[supervised]

    def _drawing_losses(self, output: Output, batch: Batch, targets: Any) -> None:
        at = batch.generation_mask
        if self.generation.predicts_next:
            at = at.roll(-1, dims=1)
        hidden = output.hidden[at].view(-1, self.generation.num_tokens, output.hidden.shape[-1])  # (N, P, D)
        supervised = cast(Tensor, batch.generation_supervised)
        for name, loss in self.generation.losses(hidden, targets).items():  # (N, P), or (N,)
            if loss.ndim == 1:  # the loss of an image counts as that of each of its positions
                loss = loss[:, None].expand(hidden.shape[:2])
            output.losses[name] = loss[supervised].flatten()
            if batch.image_source is not None:
                output.sources[name] = batch.image_source[supervised].repeat_interleave(loss.shape[1])


def check_feature_count(at: Tensor, features: Tensor, how: str) -> Tensor:
    """Return ``at`` (B, T) if it has a place for each of the features (N, P, D), else raise PromptError."""
    images, tokens, _ = features.shape
    if not torch.compiler.is_exporting() and (places := int(at.sum())) != images * tokens:
        raise PromptError(
            f"the batch has {places} places for images that are {how}, but its {images} images have"
            f" {images * tokens} features ({tokens} each): was it made by this model's own processor?"
        )
    return at


def merge_features(features: Tensor, x: Tensor, *, at: Tensor) -> Tensor:
    """Put features (N, P, D) into x (B, T, D) where ``at`` (B, T) is True, in order.

    A gather and a select rather than ``x[at] = features``: it leaves ``x`` alone and has
    no data-dependent shape, so ONNX and TensorRT can take it.
    """
    index = (at.flatten().cumsum(0) - 1).clamp(min=0)  # (B*T,)
    rows = features.flatten(0, 1)[index].view_as(x)  # (B, T, D)
    return torch.where(at.unsqueeze(-1), rows.to(x.dtype), x)
