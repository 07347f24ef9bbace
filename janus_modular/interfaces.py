"""The interfaces of components, one for each slot.

Read this first, then ``model/model.py``, one plugin, ``model/build.py``.

Shapes, everywhere in this project: B batch rows, T positions (tokens), N images, P patches or codes of an
image, C feature_dim, D hidden_size, V vocabulary size, K codebook size, H and W pixels.

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
    """The base class of the options of every component."""

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
    """Return a dataclass field for a component of ``slot``, of the type ComponentSpec or list[ComponentSpec].

    In YAML, the field is written ``{name: mlp, depth: 2}``; resolving the config turns it into a
    `ComponentSpec`.
    """
    return field(default=None, metadata={"slot": slot})


@dataclass
class PixelSpec:
    """How images are preprocessed for an understanding encoder.

    With ``resize: native``, each image keeps its aspect ratio and has a size of its own: the largest whose
    sides are multiples of ``multiple`` and whose area is at most ``height`` x ``width``. As many positions
    as there are squares of ``multiple`` pixels follow, unless the adaptor makes the same number of all.

    With ``resize: tiles``, an image is read in up to ``max_tiles`` parts of ``height`` x ``width``, and once
    more as a whole; each takes the positions of an image.
    """

    height: int = 384  # of the encoder's input, in pixels; native: of the largest square one
    width: int = 384  # of the encoder's input, in pixels; native: of the largest square one
    resize: Literal["letterbox", "crop", "stretch", "native", "tiles"] = (
        "letterbox"  # fit inside, fill and cut, distort, a size of its own, or cut into parts
    )
    multiple: int | None = None  # native: the side of a position, in pixels
    max_tiles: int | None = None  # tiles: most parts of an image
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
        errors += self._errors_of_options()
        if errors:
            raise ValueError("\n".join(errors))

    def _errors_of_options(self) -> list[str]:
        """Return errors of the options that belong to one way to resize."""
        errors = []
        for name, value, resize, meaning in (
            (
                "multiple",
                self.multiple,
                "native",
                "the side of a position in pixels: a patch, or several merged",
            ),
            ("max_tiles", self.max_tiles, "tiles", "the most parts of an image"),
        ):
            if self.resize != resize and value is not None:
                errors.append(
                    f"{name}: found {value}; it has no effect unless resize is {resize}: leave it out."
                )
            if self.resize == resize and (value is None or value < 1):
                errors.append(f"{name}: found {value}; expected {meaning}, because resize is {resize}.")
        if not errors and self.multiple:
            if self.height % self.multiple or self.width % self.multiple:
                divided = f"{self.height} and {self.width}"
                errors.append(f"multiple: found {self.multiple}; expected a divisor of {divided}.")
            elif self.height * self.width == self.multiple**2:
                errors.append(f"multiple: found {self.multiple}; expected less than the height and width.")
        return errors

    @property
    def most_images(self) -> int:
        """The most images that an encoder reads of an image: its tiles and the whole, or one."""
        return self.max_tiles + 1 if self.max_tiles is not None and self.max_tiles > 1 else 1


class UnderstandingEncoder(Protocol):
    """Encodes input images as features."""

    feature_dim: int  # C
    pixels: PixelSpec  # how images are preprocessed for it

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of features of an image of this size in pixels; P is their product.

        Return (1, P) if features correspond to no place of the image, as those of queries.
        """
        ...

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, H, W) into features (N, P, C)."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor: ...


class ImageTokenizer(Protocol):
    """Encodes target images as codes, and decodes codes into images."""

    codebooks: tuple[int, ...]  # K of each of the S codes of a position
    code_dim: int | None  # dimension of a codebook vector; None: the tokenizer has no codebook vectors
    value_range: tuple[float, float]  # of the pixels that `encode` takes and `decode` returns

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of positions of an image of this size in pixels; P is their product.

        Return (1, P) if positions correspond to no place of the image.

        Raises:
            ValueError: an image of this size cannot be encoded.
        """
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) in ``value_range`` into code ids (N, P) in raster order.

        With S codes per position, ids are (N, P, S); those of each codebook count from 0.
        """
        ...

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids, as `encode` returns them, into pixels (N, 3, height, width) in ``value_range``."""
        ...

    def codebook_embeddings(self) -> Tensor | None:
        """Return the vectors (sum of K, code_dim) that initialise the embedding of codes, or None.

        With several codes per position, the vectors of the first codebook come first.
        """
        ...

    def losses(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the named scalar losses of training this tokenizer on pixels (N, 3, H, W)."""
        ...


class ImageAutoencoder(Protocol):
    """Encodes target images as continuous latents, and decodes latents into images: a VAE, for example."""

    value_range: tuple[float, float]  # of the pixels that `encode` takes and `decode` returns

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
        """Return the number of positions P' that a grid of features becomes; most adaptors return P.

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
        """Return logits (..., K) of the next code of a position, for hidden states (..., D).

        ``before`` (..., s) are the first s codes of the position. With one code per position, s is always 0.
        """
        ...

    def __call__(self, hidden: Tensor, before: Tensor) -> Tensor: ...


class Cache(Protocol):
    """The KV cache that `Backbone.forward` writes and reads.

    The next position of a row is written at the row's length, and attends to all positions before.
    """

    def begin(self, tokens: int, together: Tensor | None = None) -> Tensor:
        """Prepare ``tokens`` (T) more positions in every row; return the attention mask (B, 1, T, S).

        S is the number of positions in the cache; True: may attend. New positions with the same number above
        0 in ``together`` (B, T) attend to each other.
        """
        ...

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, heads, T, head dim) of a layer; return those of all S positions."""
        ...


class RowCache(Cache, Protocol):
    """A KV cache with a length per row, which can be shortened: the cache of sessions in torch.

    A forward pass writes T positions to every row; `advance` then says how many of them each row keeps. The
    others are padding, which may lie beyond ``max_seq_len``, and must never overwrite kept positions.
    """

    lengths: Tensor  # (B,) int64, on the host
    max_seq_len: int  # maximum positions of a row

    def advance(self, counts: Tensor) -> None:
        """Keep the first ``counts`` (B,) of the T positions written last; the next pass overwrites the rest.

        Raises:
            PromptError: a row would hold more than ``max_seq_len``.
        """
        ...

    def truncate(self, lengths: Tensor) -> None:
        """Shorten rows to ``lengths`` (B,), each at most its present length; 0 empties a row."""
        ...

    def select(self, rows: slice) -> RowCache:
        """Return a cache of consecutive rows on the same memory: writes to it change this cache.

        Sessions prefill prompts in free rows through such a view, without changing other rows.
        """
        ...


class StateCache(RowCache, Protocol):
    """A cache of the tensors that a backbone declares (`janus_modular.DeclaresCache`).

    Tensors with the axis "capacity" have an entry for each position. All others are states of recurrent
    layers after the positions so far; zeros before the first position.
    """

    def keep(self, counts: Tensor) -> None:
        """Set, before a forward pass, how many positions (B,) of this pass each row will keep."""
        ...

    def kept(self, tokens: int) -> Tensor:
        """Return a mask (B, T) of the positions of this pass: True is kept, False is padding.

        Padding is at the end of each row. A written state must be the state after the last kept position.
        """
        ...

    def append(self, name: str, new: Tensor) -> Tensor:
        """Write a tensor's entries of the T new positions, after `begin`; return those of all S positions."""
        ...

    def read(self, name: str) -> Tensor:
        """Return the state (B, ...) before the new positions."""
        ...

    def write(self, name: str, state: Tensor) -> None:
        """Store the state (B, ...) after the last kept position."""
        ...


class Backbone(Protocol):
    """The language model: embeddings in, hidden states out."""

    hidden_size: int  # D
    context: int  # maximum length of a sequence, in positions

    @property
    def vocab_size(self) -> int:
        """V, the number of token embeddings."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (B, T, D) of token ids (B, T).

        A family that scales its embeddings (Gemma) applies the scale in `forward`, not here.
        """
        ...

    def forward(self, x: Tensor, *, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Return hidden states (B, T, D) for embeddings (B, T, D), with causal attention.

        Without a cache, a row may hold several packed sequences: ``positions`` (B, T) counts from 0 in each,
        and sequences must not attend to each other. With a cache, ``positions`` continues from
        ``cache.lengths``; the caller calls ``cache.advance`` afterwards and, for a `StateCache` (of a
        backbone that `DeclaresCache`), ``cache.keep`` before. A family's embedding scale is applied here.
        """
        ...

    def __call__(self, x: Tensor, *, positions: Tensor, cache: Cache | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Return text logits (..., V) for hidden states (..., D), with the family's scale and soft cap."""
        ...

    def new_cache(self, rows: int, max_seq_len: int) -> RowCache:
        """Return an empty cache of ``rows`` rows and ``max_seq_len`` positions, in the backbone's dtype."""
        ...

    def resize_vocab(self, vocab_size: int) -> None:
        """Grow token embedding and text head to ``vocab_size`` tokens; weights of present tokens stay."""
        ...


class GenerationPath(Protocol):
    """Generates images. ``autoregressive`` (tokenizer, adaptor, head) is the path of Janus."""

    height: int  # of generated images, in pixels
    width: int  # of generated images, in pixels
    num_tokens: int  # positions of an image in the sequence
    predicts_next: bool  # True: a position is predicted from the hidden state BEFORE it; False: from its own
    image_sampler: str  # name of the default image sampler
    frozen_submodules: tuple[str, ...]  # submodules that are never trained, whatever `learn` lists
    sizes: Mapping[str, Any]  # for image samplers, as `session.sizes`: numbers, strings, lists

    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator]) -> Any:
        """Return the training targets of images (N, 3, height, width), uint8: codes, for example.

        Take all randomness (the noise of rectified flow, for example) from ``rngs``, one generator per image:
        targets then depend neither on other images nor on the division of a step into micro-batches.
        """
        ...

    def embed(self, targets: Any) -> Tensor:
        """Return the backbone's inputs (N, num_tokens, D) for targets."""
        ...

    def losses(self, hidden: Tensor, targets: Any) -> Mapping[str, Tensor]:
        """Return the losses by name, for hidden states (N, num_tokens, D), not averaged.

        A loss has a value per position (N, P), or per image (N,), which then counts for each position.
        """
        ...

    def graphs(self) -> Sequence[GraphSpec]:
        """Return the functions that the image sampler calls by `Session.run`; export compiles these."""
        ...
