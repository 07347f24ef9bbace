"""The generation path `autoregressive`, Janus' own: an image is a sequence of codes, predicted one by one.

Shapes as in ``janus_modular.interfaces``; an image's codes are (N, P) in raster order, or (N, P, S) where a
position has several, which are predicted one after the other too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from janus_modular import (
    Adaptor,
    ComponentConfig,
    ComponentSpec,
    EncodedSpec,
    GenerationPath,
    GraphSpec,
    Head,
    ImageTokenizer,
    NotFiniteError,
    Registry,
    TensorSpec,
    component,
    hookimpl,
    mark_not_finite,
    sample_with_noise,
)
from janus_plugins.sizes import check_sizes


@dataclass
class AutoregressiveConfig(ComponentConfig):
    """The tokenizer, the adaptor, the head, and the image size."""

    tokenizer: ComponentSpec = component("image_tokenizers")  # images to codes, and back
    adaptor: ComponentSpec = component(
        "adaptors"
    )  # vectors of codes to the backbone; each code keeps its position
    head: ComponentSpec = component("heads")  # hidden states to the next code
    height: int = 384  # pixels
    width: int = 384  # pixels
    embedding_dim: int | None = None  # of the codes' own table; None: the tokenizer's code_dim
    image_guidance: bool = False  # drawings may have a third row, without the codes of given images: Janus-4o

    def __post_init__(self) -> None:
        """Check the image size."""
        check_sizes(self, height=1, width=1)


class AutoregressiveGeneration(nn.Module):
    """Predicts the codes of an image tokenizer.

    The embedding table of codes is initialised with the tokenizer's unit-length vectors, then trained
    separately from the tokenizer's codebook (Janus, section 3.1). With several codes a position, the table
    holds one codebook after another, and embeddings of a position are added (Open-MAGVIT2, section 3.2).
    """

    predicts_next = True
    image_sampler = "autoregressive"
    frozen_submodules: tuple[str, ...] = ("tokenizer",)  # no loss reaches it: its codes are targets

    def __init__(
        self,
        config: AutoregressiveConfig,
        tokenizer: ImageTokenizer,
        embedding: nn.Embedding,
        adaptor: Adaptor,
        head: Head,
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.codebooks = tokenizer.codebooks
        self.sizes: Mapping[str, Any] = {
            "codes": sum(self.codebooks),
            "codebooks": list(self.codebooks),
            **({"image_guidance": True} if config.image_guidance else {}),
        }
        self.tokenizer = tokenizer
        self._set_size(config.height, config.width)
        self.embedding = embedding
        self.adaptor = adaptor
        self.head = head

    @classmethod
    def build(
        cls, config: AutoregressiveConfig, hidden_size: int, build: Callable[..., Any]
    ) -> AutoregressiveGeneration:
        """Build the path for a backbone of ``hidden_size``; ``build`` makes its components."""
        tokenizer = build(config.tokenizer)
        drawn = tokenizer.grid(config.height, config.width)
        if min(drawn) < 1:
            raise ValueError(
                f"'{config.tokenizer.name}' has {drawn[0]}x{drawn[1]} positions for an image of"
                f" {config.height}x{config.width} pixels; expected at least 1x1: draw larger ones"
            )
        code_dim = config.embedding_dim or tokenizer.code_dim
        if code_dim is None:
            raise ValueError(f"the codes of '{config.tokenizer.name}' have no vectors: give embedding_dim")
        embedding = nn.Embedding(sum(tokenizer.codebooks), code_dim)
        adaptor = build(config.adaptor, code_dim, hidden_size)
        for grid in (drawn, (1, 1)):  # all codes in training, one after the other in sampling
            if (positions := adaptor.num_tokens(grid)) != grid[0] * grid[1]:
                raise ValueError(
                    f"'{config.adaptor.name}' makes {positions} positions of {grid[0]}x{grid[1]} codes,"
                    " and each code has to keep its own: choose another adaptor"
                )
        _check_pointwise(adaptor, config.adaptor.name, code_dim, drawn)
        head = build(config.head, hidden_size, tokenizer.codebooks)
        path = cls(config, tokenizer, embedding, adaptor, head, hidden_size)
        for vectors in path.derived_weights().values():
            embedding.weight.data.copy_(vectors)
        return path

    def derived_weights(self) -> Mapping[str, Tensor]:
        """Return the codebook of the tokenizer, from which the table of codes begins if it has its shape."""
        vectors = self.tokenizer.codebook_embeddings()
        fits = vectors is not None and vectors.shape == self.embedding.weight.shape
        return {"embedding.weight": vectors.detach()} if vectors is not None and fits else {}

    def sized(self, height: int, width: int) -> AutoregressiveGeneration:
        """Return this path for images of another size, with the same modules.

        Raises:
            ValueError: the tokenizer cannot encode the size, or the adaptor would not keep each code.
        """
        path = copy(self)
        path._set_size(height, width)
        rows, columns = path.grid
        if min(path.grid) < 1 or self.adaptor.num_tokens(path.grid) != path.num_tokens:
            raise ValueError(
                f"{height}x{width} pixels have {rows}x{columns} codes; expected at least 1x1, each of which"
                " the adaptor keeps"
            )
        return path

    def _set_size(self, height: int, width: int) -> None:
        """Set what follows from the size of images."""
        self.height, self.width = height, width
        self.grid = self.tokenizer.grid(height, width)
        self.num_tokens = self.grid[0] * self.grid[1]
        self.sizes = {**self.sizes, "grid": list(self.grid)}
        several = self.codebooks[1:] and (len(self.codebooks),)
        self.encoded = EncodedSpec((self.num_tokens, *several), ids=self.codebooks)

    @torch.no_grad()
    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator] = ()) -> Tensor:
        """Encode images (N, 3, height, width), uint8, as codes (N, P) or (N, P, S); nothing is random."""
        low, high = self.tokenizer.value_range
        x = pixels.to(self.embedding.weight.dtype) / 255 * (high - low) + low
        return self.tokenizer.encode(x)

    def embed(self, targets: Tensor) -> Tensor:
        """Embed codes, as `targets` returns them, as (N, P, D)."""
        return self.adaptor(self.vectors(self.by_code(targets)), self.grid)

    def losses(self, hidden: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Return the cross entropy (N, P) of codes, given the hidden states before them (N, P, D).

        With several codes a position, it is the sum over the codes, each given the codes before it.
        """
        codes, losses = self.by_code(targets), []
        for s, code in enumerate(codes):
            logits = self.head(hidden, known(codes[:s], hidden)).float()  # (N, P, K)
            losses.append(F.cross_entropy(logits.transpose(1, 2), code, reduction="none"))
        return {"image": reduce(torch.add, losses)}

    def by_code(self, codes: Tensor) -> Sequence[Tensor]:
        """Split codes (N, P, S) into S tensors (N, P); codes (N, P) are the only one."""
        return codes.unbind(-1) if len(self.codebooks) > 1 else [codes]

    def vectors(self, codes: Sequence[Tensor]) -> Tensor:
        """Return the sum (..., C) of the embeddings of a position's S codes (...)."""
        starts = accumulate(self.codebooks[:-1], initial=0)
        rows = [code + start if start else code for code, start in zip(codes, starts, strict=True)]
        return reduce(torch.add, map(self.embedding, rows))

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed W codes of each of R rows, (R, W) or (R, W, S), as the backbone's next inputs (R, W, D).

        They may be any codes of an image: their embeddings depend on no place in it (`_check_pointwise`).
        """
        vectors = self.vectors(self.by_code(codes))  # (R, W, C)
        x = self.adaptor(vectors.flatten(0, 1).unsqueeze(1), (1, 1))  # (R*W, 1, D)
        return x.view(codes.shape[0], codes.shape[1], self.hidden_size)

    def sample_image(
        self,
        hidden: Tensor,
        noise: Tensor,
        guidance: Tensor,
        temperature: Tensor,
        image_guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample the next codes (N,) or (N, S) of images; return these and the next inputs of all rows.

        ``hidden`` is (2N, D), conditional rows first, or (N, D) for guidance 1; or (3N, D), between them the
        rows of prompts without the codes of given images, for ``image_guidance``. ``noise`` is
        (N, sum of K) of Exp(1); ones and temperature 1 make it greedy.
        """
        images, codes, marked, of_rows = noise.shape[0], list[Tensor](), list[Tensor](), list[Tensor]()
        for of_code in noise.split(self.codebooks, dim=-1):
            logits = self.head(hidden, known(of_rows, hidden)).float()  # (R, K)
            logits = logits.unflatten(0, (-1, images))  # (1, 2 or 3, N, K)
            guided = guided_logits(logits, guidance, temperature, image_guidance)  # (N, K)
            codes.append(sample_with_noise(guided, of_code))  # (N,)
            marked.append(mark_not_finite(codes[-1], guided))
            of_rows.append(codes[-1].repeat(logits.shape[0]))  # (R,): an image's rows take its code
        x = self.adaptor(self.vectors(codes).unsqueeze(1), (1, 1)).squeeze(1)  # (N, D)
        chosen = torch.stack(marked, dim=-1) if len(marked) > 1 else marked[0]
        return chosen, x.repeat(logits.shape[0], 1)

    def log_probabilities(
        self, hidden: Tensor, targets: Tensor, *, guidance: float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        """Return the log-probabilities (N, P) with which sampling chooses codes, as `targets` returns them.

        ``hidden`` (R, P, D) are the states before each code: R is 2N, conditional rows first, or N for
        guidance 1. With several codes a position, it is the sum over the codes.
        """
        rows = len(hidden) // len(targets)
        codes, total = self.by_code(targets), []
        of_rows = [code.repeat(rows, 1) for code in codes]  # (R, P)
        for s, code in enumerate(codes):
            logits = self.head(hidden, known(of_rows[:s], hidden)).float()  # (R, P, K)
            guided = guided_logits(logits.unflatten(0, (rows, -1)), guidance, temperature)  # (N, P, K)
            total.append(guided.log_softmax(-1).gather(-1, code.unsqueeze(-1)).squeeze(-1))
        return reduce(torch.add, total)

    def decode_image(self, codes: Tensor) -> Tensor:
        """Decode codes, as `targets` returns them, into images (N, 3, height, width), uint8.

        Values are truncated, as in the published code.
        """
        low, high = self.tokenizer.value_range
        x = self.tokenizer.decode(codes, height=self.height, width=self.width).float()
        if not (torch.compiler.is_exporting() or x.is_meta) and not x.isfinite().all():
            raise NotFiniteError(
                f"the image tokenizer's decoder gives NaN or infinities in {codes.shape[0]} images; expected"
                f" values from {low} to {high}. Load it in float32 or bfloat16 (--dtype)."
            )
        return ((x - low) / (high - low) * 255).clamp(0, 255).to(torch.uint8)

    def graphs(self) -> Sequence[GraphSpec]:
        """Return the graphs: sampling and embedding of codes, the image tokenizer's encoder and decoder."""
        several = self.encoded.shape[1:]
        names = ["guidance", "temperature", *(["image_guidance"] if self.config.image_guidance else [])]
        scalars = [TensorSpec(name, "float32", ()) for name in names]
        pixels = TensorSpec("pixels", "uint8", ("images", 3, self.height, self.width))
        codes = TensorSpec("codes", "int64", ("images", *self.encoded.shape))
        return [
            GraphSpec(
                "sample_image",
                self.sample_image,
                inputs=(
                    TensorSpec("hidden", "model", ("rows", self.hidden_size)),
                    TensorSpec("noise", "float32", ("images", sum(self.codebooks))),
                    *scalars,
                ),
                outputs=(
                    TensorSpec("codes", "int64", ("images", *several)),
                    TensorSpec("x", "model", ("rows", self.hidden_size)),
                ),
                role="sample",
            ),
            GraphSpec(
                "embed_codes",
                self.embed_codes,
                inputs=(TensorSpec("codes", "int64", ("rows", "tokens", *several)),),
                outputs=(TensorSpec("embeddings", "model", ("rows", "tokens", self.hidden_size)),),
                role="embed",
            ),
            GraphSpec("decode_image", self.decode_image, (codes,), (pixels,), role="decode"),
            GraphSpec("tokenize_image", self.targets, (pixels,), (codes,), role="encode"),
        ]


@torch.no_grad()
def _check_pointwise(adaptor: Adaptor, name: str, code_dim: int, grid: tuple[int, int]) -> None:
    """Check that an adaptor maps a code alone as among all codes, because sampling embeds codes one by one.

    Random weights stand in for the adaptor's own: on the meta device those have no values, and a table of
    positions may be 0 before it is trained.

    Raises:
        ValueError: the adaptor uses the position in the grid, or other codes.
    """
    module = cast(nn.Module, adaptor)
    if any(buffer.is_meta for buffer in module.buffers()):  # its values are not known here
        return
    rng = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device="cpu")

    weights = {key: 0.1 * random(*weight.shape) for key, weight in module.named_parameters()}
    buffers = {
        key: buffer.cpu().float() if buffer.is_floating_point() else buffer.cpu()
        for key, buffer in module.named_buffers()
    }
    vectors, training = random(grid[0] * grid[1], code_dim), module.training
    module.eval()
    with torch.device("cpu"):
        together = functional_call(module, weights | buffers, (vectors[None], grid))[0]  # (P, D)
        alone = functional_call(module, weights | buffers, (vectors[:, None], (1, 1)))[:, 0]  # (P, D)
    module.train(training)
    difference = float((together - alone).abs().max())
    if not difference <= 1e-4 * float(together.abs().max()):  # float32 sums in another order: about 1e-6
        raise ValueError(
            f"'{name}' gives another embedding for a code in the {grid[0]}x{grid[1]} grid than for the"
            f" code alone (they differ by {difference:.2g}), but sampling embeds one code after the other:"
            " choose an adaptor that uses neither positions nor neighbours"
        )


def guided_logits(
    logits: Tensor,
    guidance: Tensor | float,
    temperature: Tensor | float,
    image_guidance: Tensor | None = None,
) -> Tensor:
    """Combine the logits of conditional and unconditional rows (2, N, ..., K) as (N, ..., K).

    Without guidance there are conditional rows alone (1, N, ..., K). Between the two may be rows of prompts
    without the codes of given images (3, N, ..., K).
    Guidance as in Janus, section 3.4: l = u + w (c - u). With rows p of those prompts, and their weight v,
    the condition is (c + v p) / (1 + v), as Janus-4o draws (ShareGPT-4o-Image, Chen et al. 2025).
    """
    conditional, unconditional = logits[0], logits[-1]  # of one row, both are the same
    if image_guidance is not None:
        partial = torch.cat([logits[:1], logits])[-2]  # of fewer than three rows, the conditional one
        conditional = (conditional + image_guidance * partial) / (1 + image_guidance)
    return (unconditional + guidance * (conditional - unconditional)) / temperature


def known(codes: Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Stack s codes (...) as (..., s); for s = 0, return an empty tensor for hidden states (..., D)."""
    if not codes:
        return torch.empty(*hidden.shape[:-1], 0, dtype=torch.int64, device=hidden.device)
    return torch.stack(list(codes), dim=-1)


@hookimpl
def register_generation(registry: Registry[GenerationPath]) -> None:
    """Register Janus' own path."""
    registry.add("autoregressive", AutoregressiveGeneration.build, AutoregressiveConfig)
