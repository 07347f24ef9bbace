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
    """A running model with the KV cache of its batch rows, in any runtime.

    Samplers pass the session's tensors on without reading their values. A row is a sequence with its own
    length; a row of length 0 is free. Prompts are admitted into free rows while the others stay as they are.
    `janus_modular.BaseSession` implements all but the computation.

    Lifetime: a tensor that `admit`, `extend` or `step` returns, and embeddings that `run` returns, are valid
    until the next of these calls, because a runtime may reuse the memory. `take` (embeddings and hidden
    states), `stack` (sampled ids) and `to_host` return copies. Inputs may also be numpy arrays.

    The result of a row depends on other rows only by rounding: kernels sum in another order for other shapes.

    ``sizes`` is `GenerationPath.sizes`. Of the path ``autoregressive``: ``codebooks``, K of each of the S
    codes of a position, and ``codes``, their sum.

    Every method raises PromptError for an invalid call, before anything is written: a row in use for `admit`,
    a free row for `extend`, positions beyond ``max_seq_len``, wrong shapes.
    """

    hidden_size: int  # D
    vocab_size: int  # V
    pad_id: int  # token id of padding, also in place of a dropped condition
    image_positions: int  # positions of a generated image
    sizes: Mapping[str, Any]  # of the generation path
    max_seq_len: int  # maximum positions of a row
    has_states: bool  # has recurrent layers: `truncate` takes only 0 or a row's present length

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of positions of each row (rows,), in numpy, read-only; 0: the row is free."""
        ...

    def admit(self, prompts: Sequence[TokenSequence], rows: Iterable[int]) -> Any:
        """Read one prompt into each of the free ``rows``.

        Return the hidden state of each prompt's last position (len(rows), D), in the order of ``rows``. A
        session that was opened without a number of rows gets as many as its first prompts need.
        """
        ...

    def extend(self, x: Any, counts: Any = None) -> Any:
        """Append up to W positions with embeddings x (rows, W, D) to each row.

        Return the hidden states (rows, W, D). A row keeps its first ``counts`` (rows,) positions, 0 to W;
        None: all W. The others are padding: their hidden states are undefined, and their values in x have
        no effect, but must be finite.
        """
        ...

    def truncate(self, lengths: Any) -> None:
        """Shorten each row to its length in ``lengths`` (rows,), at most its present one; 0 frees the row.

        If the session ``has_states``, a length between 0 and the present one is an error: the cache has no
        earlier states.
        """
        ...

    def free(self, rows: Iterable[int]) -> None:
        """Empty rows, so that other prompts can be admitted into them."""
        ...

    def prefill(self, prompts: Sequence[TokenSequence]) -> Any:
        """Empty all rows, then read prompt i into row i; return the prompts' last hidden states (n, D)."""
        ...

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Any:
        """Append one position with embeddings x (rows, D) to each row; return its hidden states (rows, D).

        Rows where ``active`` (rows,) is False do not change; their hidden states are undefined. None: all
        rows are active.
        """
        ...

    def run(self, name: str, *inputs: Any) -> Any:
        """Run a graph by its name; return its output, or a tuple of its outputs.

        Graphs are ``sample_text``, ``embed`` (token ids (B, T) to embeddings (B, T, D)), and those that the
        generation path declares (`GenerationPath.graphs`). Inputs may be numbers and numpy arrays.
        """
        ...

    def take(self, tensors: Any, indices: Any) -> Any:
        """Gather vectors of a tensor (..., D), or of several tensors, into a new one (*indices.shape, D).

        ``indices`` (numpy, integers) count the vectors over all leading axes, and continue from tensor to
        tensor: in hidden states (rows, W, D), the vector of row r and position w has the index r * W + w.
        """
        ...

    def stack(self, columns: Sequence[Any]) -> Any:
        """Stack the ids that `run` sampled in successive steps, each (rows, ...), to (rows, steps, ...)."""
        ...

    def to_host(self, x: Any) -> NDArray[Any]:
        """Copy a tensor of this session to a numpy array."""
        ...


@runtime_checkable
class SharedSession(Session, Protocol):
    """A session that an engine can share among requests: every subclass of `janus_modular.BaseSession`."""

    max_feed: int | None  # positions of a row that can be fed at once; None: any number
    signatures: Mapping[str, GraphSignature]  # of graphs that `run` calls; calls of others cannot be joined

    def extend_rows(self, x: Any, counts: Any, first_row: int) -> Any:
        """Append x (n, W, D) to the rows from ``first_row`` on, free or not; return states (n, W, D)."""
        ...

    def embed_prompts(self, prompts: Sequence[TokenSequence]) -> Any | None:
        """Return the embeddings (n, T, D) of prompts, padded; None: these prompts need `admit`."""
        ...

    def copy_row(self, source: int, target: int, length: int) -> bool:
        """Copy the first ``length`` positions of a row to another; return False if the session cannot."""
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
        """Open a session with ``rows`` rows of up to ``max_seq_len`` positions.

        ``rows`` is None: as many rows as the first prompts need.
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
    numbers: Sequence[int] = ()  # selects each row's noise; default: number of equal prompts before the row


@dataclass
class ImageSamplerSettings:
    """Settings that every image sampler has. The settings of a sampler inherit from this class."""

    first: int = 0  # number of each prompt's first image
    numbers: Sequence[int] = ()  # selects each image's noise; default: counts from ``first`` for each prompt


@dataclass
class CodeSamplerSettings(ImageSamplerSettings):
    """Settings of an image sampler that draws code by code, and goes on from codes that were drawn before.

    The sampler runs a graph of the role ``sample`` for each code, or for the next codes at once, of which the
    progress that it yields next counts the final ones. It returns what the graph of the role ``decode`` makes
    of all codes. With the first codes of an image as its prefix, it draws the same image:
    the noise of a code follows from the seed, the number of the image and the position alone.
    """

    prefix: Sequence[Any] = ()  # codes that each image begins with, in raster order; of S codes each: lists


TextSettingsT = TypeVar("TextSettingsT", bound=TextSamplerSettings, contravariant=True)
ImageSettingsT = TypeVar("ImageSettingsT", bound=ImageSamplerSettings, contravariant=True)

TokenSteps: TypeAlias = "Generator[NDArray[np.integer[Any]], NDArray[np.bool_] | None, None]"
"""Yields the next token ids (rows,); receives a mask (rows,) of the rows to continue, or None for all."""


@dataclass(frozen=True)
class EncodedImages:
    """Images, and the codes or latents that they were decoded from."""

    images: NDArray[Any]  # (rows, 3, H, W), uint8, or floats from -1 to 1
    encoded: NDArray[Any] | None = None  # (rows, ...), each as `EncodesImages.encoded` describes


DrawingSteps: TypeAlias = "Generator[tuple[int, int], None, NDArray[Any] | EncodedImages]"
"""Yields (steps done, steps in all); returns images (rows, 3, H, W), alone or as `EncodedImages`."""


class TextSampler(Protocol[TextSettingsT]):
    """A generator function that answers prompts in text. It must not import torch.

    Derive the noise of a row from the seed and ``settings.numbers``, so that a row does not depend on others.
    """

    def __call__(
        self, session: Session, prompts: Sequence[TokenSequence], settings: TextSettingsT, /
    ) -> TokenSteps:
        """Yield the next token ids (rows,), step by step, at most ``settings.max_tokens`` times.

        ``prompts`` has one prompt per row. After each step, the generator receives a mask (rows,) of the rows
        to continue, or None for all; ids of the other rows are ignored. It is closed when no row continues.
        """
        ...


class ImageSampler(Protocol[ImageSettingsT]):
    """A generator function that draws images. It must not import torch.

    Derive the noise of an image from the seed and ``settings.numbers``, so that an image does not depend on
    others.
    """

    def __call__(
        self, session: Session, prompts: Sequence[TokenSequence], settings: ImageSettingsT, /
    ) -> DrawingSteps:
        """Yield (steps done, steps in all) after each step; return the images (len(prompts), 3, H, W).

        Images are uint8, or floats from -1 to 1. Each prompt ends where its image begins.
        """
        ...


class Source(Protocol):
    """A stream of training samples. Built as ``Source(config)``."""

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return sample ``index``, 0 to ``len(self) - 1``; take all randomness from ``rng``.

        Raises:
            DataError: the sample cannot be used.
            UnsupervisedError: the loss would count nothing in the sample.
        """
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A source or a runtime with a digest, which is compared when runs and journalled drawings resume."""

    def fingerprint(self) -> str:
        """Return a digest that is equal only if all samples, or all results, are equal."""
        ...


class Tracker(Protocol):
    """Records the metrics of training. Built as ``Tracker(config, folder)``."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of one step, by name."""
        ...

    def close(self) -> None:
        """Write buffered metrics; called once, also after an error and before the first step."""
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
        """Return True if this parsed config.json is of this format."""
        ...

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Return the native model config (plain values, as in YAML) of a folder of this format."""
        ...

    def to_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (native name, tensor); ``weights`` has this format's names and reads lazily."""
        ...

    def write_config(self, config: Mapping[str, Any], folder: Path) -> None:
        """Write the format's config files for a native model config; the tokenizer's are already there.

        Raises:
            CheckpointError: the format cannot store one of the model's components.
        """
        ...

    def from_native(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (this format's name, tensor) for each weight; ``weights`` has native names."""
        ...


@dataclass(frozen=True)
class TaskState:
    """A request's answer, or one of its images, for the scheduler."""

    number: int  # in the order of submission
    mode: str  # answer or draw
    rows: int  # number of batch rows that the task has, or needs
    unread: int  # positions of its longest prompt that are not in the KV cache yet


@dataclass(frozen=True)
class BatchState:
    """The state of the batch between two steps."""

    rows: int  # number of rows of the session
    free_rows: int  # number of rows without a task
    waiting: Sequence[TaskState]  # tasks without rows, oldest first
    reading: Sequence[TaskState]  # tasks whose prompts are being prefilled
    running: Sequence[TaskState]  # tasks that are being decoded


@dataclass(frozen=True)
class Plan:
    """The actions of an engine before the next step."""

    admit: Sequence[int] = ()  # numbers of waiting tasks that get rows; together at most the free rows
    read: Mapping[int, int] = field(default_factory=dict)  # by task: prompt positions to prefill in each row


class Scheduler(Protocol):
    """Decides which tasks get rows, and how many prompt positions are prefilled between two steps.

    Built as ``Scheduler(config)``; must not import torch. Its decisions do not change results.
    """

    def plan(self, state: BatchState) -> Plan:
        """Return the actions before the next step; at least one if no task is being decoded."""
        ...
