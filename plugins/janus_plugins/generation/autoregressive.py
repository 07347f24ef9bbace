"""Drawing as Janus does it: a picture is a sequence of codes, predicted one after the other.

Shapes as in ``janus_modular.interfaces``; a picture's codes are (N, P) in raster order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    Adaptor,
    GenerationPath,
    Head,
    ImageTokenizer,
    Part,
    PartConfig,
    Registry,
    hookimpl,
    part,
    pick,
)


@dataclass
class AutoregressiveConfig(PartConfig):
    """A tokenizer, an adaptor and a head, and the size of the pictures."""

    tokenizer: Part = part("image_tokenizers")
    adaptor: Part = part("adaptors")
    head: Part = part("heads")
    height: int = 384  # pixels
    width: int = 384  # pixels
    embedding_width: int | None = None  # of the codes' own table; None: the tokenizer's code width


class AutoregressiveGeneration(nn.Module):
    """Codes of an image tokenizer in, the next code out.

    The codes have an embedding table of their own: a copy of the tokenizer's unit-length vectors at
    first, then trained with the adaptor, apart from the tokenizer's codebook (spec: Janus, section 3.1).
    """

    predicts_next = True
    sampling_loop = "autoregressive"
    trained_apart: tuple[str, ...] = ("tokenizer",)  # its codes are targets: no stage's loss reaches it

    def __init__(
        self,
        config: AutoregressiveConfig,
        tokenizer: ImageTokenizer,
        embedding: nn.Embedding,
        adaptor: Adaptor,
        head: Head,
    ) -> None:
        super().__init__()
        self.config = config
        self.height, self.width = config.height, config.width
        self.num_tokens = tokenizer.num_tokens(config.height, config.width)
        self.sizes: Mapping[str, int] = {"codes": tokenizer.num_codes}
        self.tokenizer = tokenizer
        self.embedding = embedding
        self.adaptor = adaptor
        self.head = head

    @classmethod
    def build(
        cls, config: AutoregressiveConfig, width: int, build: Callable[..., Any]
    ) -> AutoregressiveGeneration:
        """Build the path for a backbone of ``width``; ``build`` makes its parts."""
        tokenizer = build(config.tokenizer)
        if tokenizer.codes_per_position != 1:
            raise ValueError(
                f"'{config.tokenizer.name}' has {tokenizer.codes_per_position} codes a position;"
                " the autoregressive path predicts one: choose a tokenizer with one"
            )
        vectors = tokenizer.code_vectors()
        code_width = config.embedding_width or tokenizer.code_width
        if code_width is None:
            raise ValueError(f"the codes of '{config.tokenizer.name}' have no vectors: give embedding_width")
        embedding = nn.Embedding(tokenizer.num_codes, code_width)
        if vectors is not None and vectors.shape == embedding.weight.shape:
            embedding.weight.data.copy_(vectors.detach())
        adaptor = build(config.adaptor, code_width, width)
        head = build(config.head, width, tokenizer.num_codes)
        return cls(config, tokenizer, embedding, adaptor, head)

    @torch.no_grad()
    def targets(self, pixels: Tensor) -> Tensor:
        """Encode pictures (N, 3, height, width), uint8, as codes (N, P)."""
        low, high = self.tokenizer.value_range
        x = pixels.to(self.embedding.weight.dtype) / 255 * (high - low) + low
        return self.tokenizer.encode(x)

    def embed(self, targets: Tensor) -> Tensor:
        """Embed codes (N, P) as (N, P, D)."""
        return self.adaptor(self.embedding(targets))

    def losses(self, hidden: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Take the cross entropy (N, P) of codes (N, P) under the states before them (N, P, D)."""
        logits = self.head(hidden).float()  # (N, P, K)
        return {"image": F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")}

    def image_next(
        self, hidden: Tensor, noise: Tensor, guidance: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose the next code of each picture; return codes (N,) and the next inputs of all rows.

        ``hidden`` is (2N, D), conditional rows first, or (N, D) for guidance 1. ``noise`` is (N, K)
        of Exp(1); ones and temperature 1 make it greedy. Guidance as in Janus, section 3.4:
        l = u + w (c - u).
        """
        logits = self.head(hidden).float().unflatten(0, (-1, noise.shape[0]))  # (1 or 2, N, K)
        conditional, unconditional = logits[0], logits[-1]  # of one row, both are the same
        codes = pick((unconditional + guidance * (conditional - unconditional)) / temperature, noise)  # (N,)
        x = self.adaptor(self.embedding(codes).unsqueeze(1)).squeeze(1)  # (N, D)
        return codes, x.repeat(logits.shape[0], 1)

    def draw(self, codes: Tensor) -> Tensor:
        """Decode codes (N, P) into pictures (N, 3, height, width), uint8, truncated as the authors do."""
        low, high = self.tokenizer.value_range
        x = self.tokenizer.decode(codes, height=self.height, width=self.width).float()
        return ((x - low) / (high - low) * 255).clamp(0, 255).to(torch.uint8)

    def parts(self) -> Mapping[str, Callable[..., Any]]:
        """What sampling calls and export compiles."""
        return {"image_next": self.image_next, "draw": self.draw, "tokenize_image": self.targets}


@hookimpl
def register_generation(registry: Registry[GenerationPath]) -> None:
    """Offer Janus' own path."""
    registry.add("autoregressive", AutoregressiveGeneration.build, AutoregressiveConfig)
