"""The interfaces of components, one for each slot.

Read this first, then ``model/model.py``, one plugin, ``model/build.py``.

Shapes, everywhere in this project: B rows, T positions, N images, P patches or codes of an image,
C feature_dim, D hidden_size, V vocabulary, K codebook size, H and W pixels.

Components are ``torch.nn.Module``s that match these protocols; nothing has to be inherited.
torch is imported for types only, so that importing this module costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from janus_modular.graph_specs import GraphSpec


@dataclass
class ComponentConfig:
    """The base of every component's config: where its weights come from."""

    pretrained: str | None = None  # a folder, a file, or a hub id; None: random weights
    revision: str | None = None  # with a hub id: a commit, a tag or a branch


@dataclass
class ComponentSpec:
    """A component chosen for a slot: its registered name, and its options as the registered dataclass."""

    slot: str
    name: str
    config: Any
    path: str = field(default="", compare=False)  # in the user's config, for errors: model.backbone


def component(slot: str) -> Any:
    """Declare a dataclass field that holds a component of ``slot`` (or, as ``list[ComponentSpec]``, several).

    In YAML it reads ``{name: mlp, depth: 2}``; once resolved, the field holds a `ComponentSpec`.
    """
    return field(default=None, metadata={"slot": slot})


@dataclass
class PixelSpec:
    """How images are preprocessed for an understanding encoder."""

    height: int = 384  # of the encoder's images, in pixels
    width: int = 384  # in pixels
    resize: Literal["letterbox", "crop", "stretch"] = "letterbox"  # fit inside, fill and cut, or distort
    normalize: bool = True  # (x - mean) / std, with x in [0, 1]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)  # of red, green, blue
    fill: tuple[int, int, int] | None = None  # letterbox borders; None: int(255 * mean)
    min_size: int = 14  # letterbox: no side gets shorter than this, in pixels

    def __post_init__(self) -> None:
        """Raise ValueError for sizes and statistics that no image has."""
        sides = {"height": self.height, "width": self.width}
        errors = [f"{name}: {side}; expected at least 1." for name, side in sides.items() if side < 1]
        for name, values in {"mean": self.mean, "std": self.std}.items():
            is_std = name == "std"
            if len(values) != 3 or not all(0 <= value <= 1 and (value or not is_std) for value in values):
                limits = "above 0, at most 1" if is_std else "from 0 to 1"
                errors.append(f"{name}: {values}; expected three numbers {limits}, for pixels from 0 to 1.")
        if errors:
            raise ValueError("\n".join(errors))


class UnderstandingEncoder(Protocol):
    """Encodes input images as features."""

    feature_dim: int  # C
    pixels: PixelSpec  # how images are preprocessed for it

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of features of an image of this size; P is their product.

        Features without a place in the image form a single row: (1, P).
        """
        ...

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


class ImageTokenizer(Protocol):
    """Encodes target images as codes, and decodes codes into images."""

    codebooks: tuple[int, ...]  # K of each of the S codes of a position
    code_dim: int | None  # dimension of a code's embedding; None where codes have none
    value_range: tuple[float, float]  # of pixels, in and out

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of an image's positions; raise ValueError for an impossible size.

        Positions without a place in the image form a single row: (1, P).
        """
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) in ``value_range`` into code ids (N, P), raster order.

        Where a position has several codes, ids are (N, P, S), each counting from 0.
        """
        ...

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids, as `encode` returns them, into pixels (N, 3, height, width) in ``value_range``."""
        ...

    def codebook_embeddings(self) -> Tensor | None:
        """Return the embeddings (sum of K, code_dim) that initialise the generation path's, or None.

        Where positions have several codes, the embeddings of the first code come first.
        """
        ...

    def losses(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the named scalar losses of training this tokenizer on pixels (N, 3, H, W)."""
        ...


class ImageAutoencoder(Protocol):
    """Encodes target images as continuous latents, and decodes latents into images: a VAE, for example."""

    value_range: tuple[float, float]  # of pixels, in and out

    def encoded_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of an image's latents; raise ValueError for an impossible size."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) in ``value_range`` as latents (N, C, h, w) of about unit variance."""
        ...

    def decode(self, encoded: Tensor, *, height: int, width: int) -> Tensor:
        """Decode latents, as `encode` returns them, into pixels (N, 3, height, width) in ``value_range``."""
        ...

    def losses(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the named scalar losses of training this autoencoder on pixels (N, 3, H, W)."""
        ...


class Adaptor(Protocol):
    """Projects features to the backbone's hidden size. Built as ``factory(config, C, D)``."""

    def num_tokens(self, grid: tuple[int, int]) -> int:
        """Return the number of positions P' for a grid of features; most adaptors keep P.

        Raises:
            ValueError: the adaptor cannot take a grid of this size.
        """
        ...

    def forward(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Project features (N, P, C), in raster order of ``grid``, to embeddings (N, P', D)."""
        ...

    def __call__(self, features: Tensor, grid: tuple[int, int]) -> Tensor: ...


class Head(Protocol):
    """Predicts codes. Built as ``factory(config, D, codebooks)``."""

    codebooks: tuple[int, ...]  # K of each of the S codes of a position

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        """Return logits (..., K) of a position's next code for hidden states (..., D).

        ``before`` (..., s) are the position's codes that are known already. For the first code, s is 0;
        with one code per position, s is always 0.
        """
        ...

    def __call__(self, hidden: Tensor, before: Tensor) -> Tensor: ...


class Cache(Protocol):
    """A KV cache, as `Backbone.forward` writes and reads it.

    A row's next position is written at its length, and attends to all positions before it.
    """

    def begin(self, tokens: int, together: Tensor | None = None) -> Tensor:
        """Prepare ``tokens`` more positions of every row; return the attention mask (B, 1, T, S).

        New positions of one number above 0 in ``together`` (B, T) see each other.
        """
        ...

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values (B, heads, T, head dim); return those of all S positions."""
        ...


class RowCache(Cache, Protocol):
    """A KV cache whose rows have lengths of their own and can be emptied, as sessions in torch need.

    All rows are fed alike, and each keeps as many positions as `advance` says. Other positions are
    padding: they may lie beyond ``max_seq_len``, and never overwrite kept positions.
    """

    lengths: Tensor  # (B,) int64, on the host
    max_seq_len: int  # maximum positions of a row

    def advance(self, counts: Tensor) -> None:
        """Keep the first ``counts`` (B,) of the positions written last; the next write replaces the rest.

        Raises:
            PromptError: a row would hold more than ``max_seq_len``.
        """
        ...

    def truncate(self, lengths: Tensor) -> None:
        """Truncate rows to ``lengths`` (B,), none longer than before; 0 empties a row."""
        ...

    def select(self, rows: slice) -> RowCache:
        """Return a cache of consecutive rows as a view on the same memory: writes to it change this cache.

        Sessions read prompts into free rows through it, while the other rows stay as they are.
        """
        ...


class StateCache(RowCache, Protocol):
    """A cache of the tensors that a backbone declares (`janus_modular.DeclaresCache`).

    Tensors with the axis "capacity" hold an entry for each position. All others are states: what a recurrence
    keeps of the positions so far, zeros before the first.
    """

    def keep(self, counts: Tensor) -> None:
        """Declare, before a forward pass, that the first ``counts`` (B,) of its positions are kept."""
        ...

    def kept(self, tokens: int) -> Tensor:
        """Return which of ``tokens`` more positions are kept (B, T), the first ones of each row.

        The others are padding: a state that is written must be that after the kept positions.
        """
        ...

    def append(self, name: str, new: Tensor) -> Tensor:
        """Write a tensor's entries of T new positions, after `begin`; return those of all S positions."""
        ...

    def read(self, name: str) -> Tensor:
        """Return a state (B, ...), that before the new positions."""
        ...

    def write(self, name: str, state: Tensor) -> None:
        """Set a state (B, ...) to that after the kept positions."""
        ...


class Backbone(Protocol):
    """The language model: embeddings in, hidden states out."""

    hidden_size: int  # D
    context: int  # longest sequence, in positions

    @property
    def vocab_size(self) -> int:
        """The number of rows V of the token embedding."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of token ids (B, T), before the family's input scale."""
        ...

    def forward(self, x: Tensor, *, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Return hidden states (B, T, D) for embeddings (B, T, D), with causal attention.

        ``positions`` (B, T): without a cache, a row may hold several sequences, each counting from 0,
        and a sequence does not see the others. With a cache, positions continue from ``cache.lengths``;
        call ``cache.advance`` afterwards, and for a `StateCache`, which a backbone gets that declares its
        cache's tensors, ``cache.keep`` before. The family's input scale is applied here, once, to all of x.
        """
        ...

    def __call__(self, x: Tensor, *, positions: Tensor, cache: Cache | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return text logits (..., V) for hidden states (..., D), with the family's scale and cap."""
        ...

    def new_cache(self, rows: int, max_seq_len: int) -> RowCache:
        """Return an empty cache on the backbone's device, in its dtype."""
        ...

    def resize_vocab(self, vocab_size: int) -> None:
        """Grow the token embedding and the text logits to ``vocab_size`` rows; old rows stay."""
        ...


class GenerationPath(Protocol):
    """Generates images. ``autoregressive`` (tokenizer, adaptor, head) is the path of Janus."""

    height: int  # of the images it draws, in pixels
    width: int  # in pixels
    num_tokens: int  # positions one image takes in a sequence
    predicts_next: bool  # losses read the hidden state BEFORE each position (True) or at it (False)
    image_sampler: str  # the registered image sampler that draws with it, unless the config has another
    frozen_submodules: tuple[str, ...]  # submodules that no stage may train, regardless of `learn`
    sizes: Mapping[str, Any]  # what image samplers read from `session.sizes`: numbers, strings, lists

    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator]) -> Any:
        """Return what is to be predicted of images (N, 3, height, width), uint8: codes, for example.

        ``rngs`` are the images' own generators, one each: randomness from them (the noise of rectified flow,
        for example) depends neither on other images nor on how a step is divided into micro-batches.
        """
        ...

    def embed(self, targets: Any) -> Tensor:
        """Embed targets as (N, num_tokens, D)."""
        ...

    def losses(self, hidden: Tensor, targets: Any) -> Mapping[str, Tensor]:
        """Return named losses from hidden states (N, num_tokens, D).

        A loss is per position (N, P), or per image (N,) and then counts for each position of the image.
        """
        ...

    def graphs(self) -> Sequence[GraphSpec]:
        """Declare the functions that the sampler runs through its session, which are what export compiles."""
        ...
