"""Protocols around the model: sessions, samplers, sources, trackers, checkpoint formats, capabilities.

Shapes as in ``janus_modular.interfaces``. Nothing has to be inherited but the settings of samplers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from janus_modular.graph_specs import GraphSignature
    from janus_modular.model.model import JanusModel
    from janus_modular.sequence import Sample
    from janus_modular.sequence import Sequence as TokenSequence


class Session(Protocol):
    """A running model, in any runtime. Samplers pass its tensors on without reading their values.

    A session holds rows: sequences with lengths of their own, which do not depend on one another. Prompts are
    admitted into free rows while the others keep what they hold; rows are fed one or several positions at
    once, truncated and freed. `janus_modular.BaseSession` implements all but the computation.

    A tensor that `admit`, `extend` or `step` returns, and the next inputs of rows that `run` returns, are
    valid until the next of these calls: a runtime may write its results to the same memory each time. To keep
    values longer, copy them by `take` (embeddings and hidden states), `stack` (sampled ids) or `to_host`.
    Tensors that are passed in may also be numpy arrays.

    A row's result does not depend on what the other rows hold, up to the rounding of its dtype: kernels
    sum in another order for other shapes.

    ``sizes`` are the generation path's own (`GenerationPath.sizes`), under the names that its sampler knows:
    of Janus' path ``codebooks``, K of each of the S codes of a position, and ``codes``, their sum.

    An invalid call raises `janus_modular.PromptError` before anything is written: a row in use for `admit`,
    a free row for `extend`, positions beyond ``max_seq_len``, wrong shapes.
    """

    hidden_size: int  # D
    vocab_size: int  # V
    pad_id: int  # the token id that stands for a dropped condition
    image_positions: int  # positions that a drawn image takes
    sizes: Mapping[str, Any]  # the generation path's own
    max_seq_len: int  # maximum positions of a row
    has_states: bool  # recurrent layers have states: `truncate` takes 0 or a row's whole length

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The positions that each row holds (rows,), on the host, read only; 0: the row is free."""
        ...

    def admit(self, prompts: Sequence[TokenSequence], rows: Iterable[int]) -> Any:
        """Read one prompt into each of the free ``rows``; return the last hidden states (len(rows), D).

        A session that was opened without a number of rows gets as many as its first prompts need.
        """
        ...

    def extend(self, x: Any, counts: Any = None) -> Any:
        """Feed up to W positions a row, x (rows, W, D); return all hidden states (rows, W, D).

        ``counts`` (rows,), 0 to W, says how many of a row's positions are kept; None: all. The states of
        other positions are undefined, and the values of x there have no effect; they must be finite.
        """
        ...

    def truncate(self, lengths: Any) -> None:
        """Cut each row back to its length (rows,), at most what it holds; 0 frees it.

        Where the session ``has_states``, a length between is an error, because they are not known there.
        """
        ...

    def free(self, rows: Iterable[int]) -> None:
        """Empty rows, so that other prompts can be admitted into them."""
        ...

    def prefill(self, prompts: Sequence[TokenSequence]) -> Any:
        """Start again with one prompt a row, rows 0 to n - 1; return the last hidden states (n, D)."""
        ...

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Feed one embedding a row (rows, D); return the hidden states that follow (rows, D).

        Rows that are not ``active`` (rows,) stay as they are; their states are undefined.
        """
        ...

    def run(self, name: str, *inputs: Any) -> Any:
        """Run a graph: ``sample_text``, ``embed`` (tokens (B, T) to (B, T, D)), those of the generation path.

        Inputs may be numbers and numpy arrays.
        """
        ...

    def take(self, tensors: Any, indices: Any) -> Any:
        """Return vectors of one tensor (..., D), or of several, copied into a new tensor (*indices.shape, D).

        ``indices``, whole numbers in numpy, count the vectors through all leading axes, and through one
        tensor after the other: of hidden states (rows, W, D), row r and position w are r * W + w.
        """
        ...

    def stack(self, columns: Sequence[Any]) -> Any:
        """Join the ids that `run` sampled in successive steps (rows, ...) as (rows, steps, ...)."""
        ...

    def to_host(self, x: Any) -> NDArray[Any]:
        """Copy a tensor of this session's to numpy."""
        ...


@runtime_checkable
class SharedSession(Session, Protocol):
    """A session whose rows an engine shares among callers; `janus_modular.BaseSession` has all of it."""

    max_feed: int | None  # positions of a row that can be fed at once; None: any number
    signatures: Mapping[str, GraphSignature]  # of graphs that `run` calls; calls of others cannot be joined

    def extend_rows(self, x: Any, counts: Any, first_row: int) -> Any:
        """Feed x (n, W, D) to the rows from ``first_row`` on, free ones too; return states (n, W, D)."""
        ...

    def embed_prompts(self, prompts: Sequence[TokenSequence]) -> Any | None:
        """Return the embeddings (n, T, D) of prompts; None: it reads prompts by `admit` alone."""
        ...

    def copy_row(self, source: int, target: int, length: int) -> bool:
        """Copy the first positions of a row to another; return False if it cannot."""
        ...

    def expand(self, x: Any) -> Any:
        """Return (n, D) as (n, 1, D), in the same memory."""
        ...

    def squeeze(self, x: Any) -> Any:
        """Return (n, 1, D) as (n, D), in the same memory."""
        ...


class Runtime(Protocol):
    """A loaded model: opens sessions, and names the samplers that drive them.

    Runtimes of exported bundles are plugins, built as ``Runtime(config, folder)``; their configs have
    ``variant`` and ``device``.
    """

    context: int  # longest sequence, in positions
    text_sampler: str  # the registered text sampler
    image_sampler: str  # the registered image sampler

    def open(self, max_seq_len: int, rows: int | None = None) -> Session:
        """Open a session whose rows hold up to ``max_seq_len`` positions.

        ``rows``: how many there are; None: as many as the first prompts need.
        """
        ...


@runtime_checkable
class ModelRuntime(Runtime, Protocol):
    """A runtime of a model in torch."""

    model: JanusModel


@runtime_checkable
class VariantRuntime(Runtime, Protocol):
    """A runtime of a bundle, of which it opened one variant."""

    variant: str


@dataclass
class TextSamplerSettings:
    """Settings that every text sampler has. The settings of a sampler inherit from this class."""

    max_tokens: int = 512  # of an answer
    numbers: Sequence[
        int
    ] = ()  # of each row, for its noise; default: how many rows before it have its prompt


@dataclass
class ImageSamplerSettings:
    """Settings that every image sampler has. The settings of a sampler inherit from this class."""

    first: int = 0  # the number of a prompt's first image
    numbers: Sequence[int] = ()  # of each image, for its noise; default: counted from first for every prompt


@dataclass
class CodeSamplerSettings(ImageSamplerSettings):
    """Settings of an image sampler that draws code by code, and goes on from codes that were drawn before.

    The sampler runs a graph of the role ``sample`` once for each code, and returns what the graph of the role
    ``decode`` makes of all codes. With the first codes of an image as its prefix, it draws the same image:
    the noise of a code follows from the seed, the number of the image and the position alone.
    """

    prefix: Sequence[Any] = ()  # codes that each image begins with, in raster order; of S codes each: lists


TextSettingsT = TypeVar("TextSettingsT", bound=TextSamplerSettings, contravariant=True)
ImageSettingsT = TypeVar("ImageSettingsT", bound=ImageSamplerSettings, contravariant=True)

TokenSteps: TypeAlias = "Generator[NDArray[np.integer[Any]], NDArray[np.bool_] | None, None]"
"""Yields the next token ids (rows,); is sent which rows continue, a mask (rows,), or None for all."""


@dataclass(frozen=True)
class EncodedImages:
    """Images, and what they were decoded from."""

    images: NDArray[Any]  # (rows, 3, H, W), uint8, or floats from -1 to 1
    encoded: NDArray[Any] | None = None  # (rows, ...), each as `EncodesImages.encoded` describes


DrawingSteps: TypeAlias = "Generator[tuple[int, int], None, NDArray[Any] | EncodedImages]"
"""Yields (steps done, steps in all); returns images (rows, 3, H, W), alone or as `EncodedImages`."""


class TextSampler(Protocol[TextSettingsT]):
    """A generator function that answers prompts in text. Imports no torch.

    The noise of a row follows from the seed and the row's number, so that the row does not depend on others.
    """

    def __call__(
        self, session: Session, prompts: Sequence[TokenSequence], settings: TextSettingsT, /
    ) -> TokenSteps:
        """Answer one prompt a row, in up to ``settings.max_tokens`` tokens.

        The ids of inactive rows are ignored. The generator is closed once no row is active.
        """
        ...


class ImageSampler(Protocol[ImageSettingsT]):
    """A generator function that draws images. Imports no torch.

    The noise of an image follows from the seed and the image's number, so that the image does not depend on
    others.
    """

    def __call__(
        self, session: Session, prompts: Sequence[TokenSequence], settings: ImageSettingsT, /
    ) -> DrawingSteps:
        """Draw one image for each prompt; a prompt ends where the image begins."""
        ...


class Source(Protocol):
    """A stream of training samples. Built as ``Source(config)``."""

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index``; all randomness comes from ``rng``, so that the sample is reproducible.

        Raises:
            DataError: the sample cannot be used.
            UnsupervisedError: nothing can be learned in it.
        """
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A source or a runtime that may be another between two runs: fingerprints are compared on resuming.

    Of a source when a training run is resumed, of a runtime when an engine resumes drawings of its journal.
    """

    def fingerprint(self) -> str:
        """Return a digest; equal only where every sample, or every result, is the same."""
        ...


class Tracker(Protocol):
    """Records the metrics of training. Built as ``Tracker(config, folder)``."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the named values of one step."""
        ...

    def close(self) -> None:
        """Write what is still buffered."""
        ...


@runtime_checkable
class LogsImages(Tracker, Protocol):
    """A tracker that also records images: the drawings of a validation."""

    def log_images(self, step: int, images: Mapping[str, Image.Image]) -> None:
        """Record the named images of one step."""
        ...


@runtime_checkable
class LogsTexts(Tracker, Protocol):
    """A tracker that also records texts: the answers of a validation."""

    def log_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Record the named texts of one step."""
        ...


@runtime_checkable
class LogsConfig(Tracker, Protocol):
    """A tracker that also records the settings of a run."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Record the resolved config, as plain values; called once, before the first step."""
        ...


class CheckpointFormat(Protocol):
    """A third-party checkpoint format. Weights are converted as a stream, a tensor at a time."""

    model_type: str  # as in its config.json

    def detect(self, config: Mapping[str, Any]) -> bool:
        """Return True if a folder's parsed config.json is of this format."""
        ...

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Read the folder's configs as a native model config: a mapping as YAML would hold it."""
        ...

    def to_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield native names and tensors from this format's; ``weights`` reads lazily."""
        ...

    def write_config(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write the format's config files for a native model config; the tokenizer's are there already.

        Raises:
            CheckpointError: the format cannot store one of the model's components.
        """
        ...

    def from_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield this format's names and tensors from native ones."""
        ...


@dataclass(frozen=True)
class TaskState:
    """An answer, or an image of a drawing, as a scheduler sees it."""

    number: int  # in the order of submission
    mode: str  # answer or draw
    rows: int  # that it has, or needs
    unread: int  # positions of its longest prompt that are still to be read


@dataclass(frozen=True)
class BatchState:
    """The running batch between two steps."""

    rows: int  # of the session
    free_rows: int  # that no task has
    waiting: Sequence[TaskState]  # without rows, oldest first
    reading: Sequence[TaskState]  # whose prompts are being read
    running: Sequence[TaskState]  # that make steps


@dataclass(frozen=True)
class Plan:
    """What an engine does before the next step."""

    admit: Sequence[int] = ()  # numbers of waiting tasks that get rows; together at most the free rows
    read: Mapping[int, int] = field(default_factory=dict)  # positions of each row, by task: read or admitted


class Scheduler(Protocol):
    """Decides which requests get rows, and how fast prompts are read. Built as ``Scheduler(config)``.

    Imports no torch. Whatever it decides, results are the same.
    """

    def plan(self, state: BatchState) -> Plan:
        """Return what to do before the next step; something must be done if nothing runs."""
        ...
