"""The objective `sigmoid-contrastive`: trains an understanding encoder on images with captions, as SigLIP.

Every pair of an image and a caption of a step is a binary classification (Zhai et al. 2023, "Sigmoid loss for
language image pre-training", algorithm 1). The text side is a backbone of the config, as a rule a small one;
it is trained too, and is no part of the model. The features of an image are averaged, and the states of a
caption are those at its last token; both are projected to unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    Backbone,
    ComponentSpec,
    DataError,
    DeclaresPositions,
    JanusModel,
    Losses,
    Objective,
    Processor,
    Registry,
    Sample,
    caption_ids,
    captioned_image_of,
    component,
    gather_examples,
    gathered_rows,
    hookimpl,
    input_pixels,
)
from janus_plugins.sizes import check_sizes


@dataclass
class SigmoidContrastiveConfig:
    """The text tower, and where temperature and bias begin; defaults are SigLIP's."""

    text: ComponentSpec = component("backbones")  # reads captions: token ids of the model's own tokenizer
    embedding_dim: int | None = None  # of the vectors that are compared; null: the encoder's feature_dim
    max_tokens: int = 64  # of a caption; the end of a longer one is left out
    scale: float = 10.0  # of cosines at the start, exp of the learned temperature
    bias: float = -10.0  # of logits at the start; for steps of few pairs, the log odds of a positive one
    positives: Literal["pairs", "equal_captions"] = (
        "pairs"  # equal_captions: an image also belongs to captions that equal its own, as those of its class
    )

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(self, max_tokens=1)
        if not self.scale > 0 or (self.embedding_dim is not None and self.embedding_dim < 1):
            raise ValueError(
                f"scale {self.scale}, embedding_dim {self.embedding_dim}: expected a scale above 0, and"
                " dimensions from 1, or null."
            )


class SigmoidContrastive(nn.Module):
    """Compares all images and captions of a step, over all of its processes.

    It reports ``matched``: the share of images that are nearest to a caption of their own.
    """

    trains: Sequence[str] = ("understanding.encoder",)
    compares_examples = True

    def __init__(
        self, config: SigmoidContrastiveConfig, model: JanusModel, build: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.config = config
        self.text: Backbone = build(config.text)
        if isinstance(self.text, DeclaresPositions) and self.text.position_axes:
            raise ValueError(f"text: '{config.text.name}' needs position ids on several axes; choose another")
        if model.understanding.encoder.pixels.resize == "native":
            raise ValueError(
                "understanding.encoder.pixels.resize: found native; expected letterbox, crop or stretch,"
                " since the images of a step are compared in one batch. An encoder that was trained so reads"
                " native sizes too"
            )
        feature_dim = model.understanding.encoder.feature_dim
        dim = config.embedding_dim or feature_dim
        self.image_projection = nn.Linear(feature_dim, dim, bias=False)
        self.text_projection = nn.Linear(self.text.hidden_size, dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(log(config.scale)))
        self.bias = nn.Parameter(torch.tensor(float(config.bias)))

    def example(
        self, sample: Sample, processor: Processor, rng: np.random.Generator
    ) -> Mapping[str, NDArray[Any]]:
        """Return the pixels (3, H, W) of the sample's image, and its caption's ids (max_tokens,), padded."""
        image, caption = captioned_image_of(sample)
        ids = caption_ids(caption, processor)[: self.config.max_tokens]
        if (largest := int(ids.max())) >= self.text.vocab_size:
            raise DataError(
                f"the caption has the token {largest}; the text tower of the objective has"
                f" {self.text.vocab_size:,}. Give it the vocabulary of the model's tokenizer"
            )
        padded = np.zeros(self.config.max_tokens, np.int64)
        padded[: len(ids)] = ids
        pixels = input_pixels(image, processor)
        return {"pixels": pixels, "ids": padded, "length": np.array(len(ids), np.int64)}

    def losses(self, model: JanusModel, batch: Mapping[str, Tensor], *, step: int) -> Losses:
        """Return the loss (n,) of each image of pixels (n, 3, H, W), against all captions of the step."""
        images = self.embed_images(model, batch["pixels"])  # (n, E)
        texts = self.embed_captions(batch["ids"], batch["length"])  # (n, E)
        rows = torch.arange(len(images), device=images.device)
        ids = batch["ids"]
        if self.training:
            texts, ids = gather_examples(texts), gather_examples(ids)  # (N, E), (N, max_tokens)
            rows = gathered_rows(len(images)).to(images.device)
        positive = torch.zeros(len(images), len(texts), dtype=torch.bool, device=images.device)
        if self.config.positives == "pairs":
            positive[torch.arange(len(images), device=images.device), rows] = True
        else:
            positive = (batch["ids"][:, None] == ids[None]).all(-1)  # (n, N)
        similarity = images.float() @ texts.float().T  # (n, N)
        loss = sigmoid_loss(similarity, positive, self.scale.exp(), self.bias)
        matched = positive.gather(1, similarity.argmax(1, keepdim=True)).float().sum()
        metrics = {
            "matched": (matched, float(len(images))),
            "scale": (self.scale.detach().exp(), 1.0),
            "bias": (self.bias.detach(), 1.0),
        }
        return Losses({"pairs": loss}, metrics)

    def embed_images(self, model: JanusModel, pixels: Tensor) -> Tensor:
        """Embed images (n, 3, H, W), uint8, as unit vectors (n, E)."""
        understanding = model.understanding
        features = understanding.encoder(understanding.normalize(pixels))  # (n, P, C)
        return F.normalize(self.image_projection(features.mean(1)), dim=-1)

    def embed_captions(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Embed captions (n, T), padded behind their ``lengths`` (n,), as unit vectors (n, E).

        The text tower is causal, so that no state depends on the padding behind it.
        """
        ids = ids[:, : int(lengths.max())]
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        hidden = self.text(self.text.embed(ids), positions=positions)  # (n, T, D)
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]  # (n, D)
        return F.normalize(self.text_projection(last), dim=-1)


def sigmoid_loss(similarity: Tensor, positive: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return the loss (n,) of images: the sum over N captions of the binary cross entropies of their pairs.

    ``similarity`` (n, N) are cosines, ``positive`` (n, N) is True where image and caption belong together.
    """
    logits = similarity * scale + bias
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum(-1)


@hookimpl
def register_objectives(registry: Registry[Objective]) -> None:
    """Register ``sigmoid-contrastive``."""
    registry.add("sigmoid-contrastive", SigmoidContrastive, SigmoidContrastiveConfig)
