"""Optional capabilities of components, found with ``isinstance``: methods beyond those of their slot.

Shapes as in ``janus_modular.interfaces``. Nothing has to be inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from janus_modular.interfaces import Adaptor, Backbone, GenerationPath, RowCache

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from janus_modular.graph_specs import TensorSpec
    from janus_modular.interfaces import ComponentSpec
    from janus_modular.sequence import EncodedSpec


@runtime_checkable
class EncodesImages(GenerationPath, Protocol):
    """A generation path whose targets can be stored: samples may hold these arrays, and drawings return them.

    `GenerationPath.targets` then returns a tensor (N, ...) of the declared shape and dtype.
    """

    encoded: EncodedSpec  # of one image


@runtime_checkable
class DeclaresCache(Backbone, Protocol):
    """A backbone whose cache is more than keys and values: states of recurrent layers, say.

    Sessions and exported graphs carry the tensors that it declares; `new_cache` returns a
    `janus_modular.TensorCache` of them.

    The first axis of a tensor is "rows". One other may be "capacity", which makes an entry for each position;
    a tensor without it is a state. All other axes are sizes. A dtype is "model" or "float32".
    """

    cache_tensors: Sequence[TensorSpec]  # what a step needs of earlier positions


@runtime_checkable
class DeclaresPositions(Backbone, Protocol):
    """A backbone whose positions have ids on several axes, beside their index: multimodal rotary embeddings.

    The ``positions`` of `forward` are then (1 + P, B, T): the index in the sequence, and the ids on P axes,
    which follow from texts and images (`janus_modular.PositionRule`).
    """

    position_axes: Sequence[str]  # temporal, height, width: P of them, in the order of its ids


@runtime_checkable
class AttendsTogether(Backbone, Protocol):
    """A backbone with blocks of positions that see each other, where all others are causal.

    ``forward`` has the argument ``together`` (B, T), None or the block of each position: positions of one
    number above 0 see each other, whichever comes first, if they are of one sequence.
    """

    def refuse_together(self) -> str:
        """Return why this backbone, as configured, has no such blocks; "" where it has."""
        ...


@runtime_checkable
class ReshapesGrid(Adaptor, Protocol):
    """An adaptor whose positions are in another grid than the features."""

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of positions for a grid of features; (1, P') if they have no place."""
        ...


@runtime_checkable
class HasLogProbabilities(GenerationPath, Protocol):
    """A generation path that gives the log-probability of an image's codes, as policy gradients need."""

    def log_probabilities(
        self, hidden: Tensor, targets: Tensor, *, guidance: float, temperature: float
    ) -> Tensor:
        """Return the log-probabilities (N, P) with which sampling chooses the targets (N, ...).

        ``hidden`` (R, P, D) are the states that the positions are predicted from: conditional rows first,
        then as many unconditional ones, or N conditional rows for guidance 1.
        """
        ...


@runtime_checkable
class AlignsHiddenStates(GenerationPath, Protocol):
    """A generation path with losses between hidden states inside the backbone and an image's features.

    The features are the understanding encoder's, of the target image itself, without a gradient. Its images
    then have the size of the path's, and the backbone is one that `ReturnsLayer`.
    """

    align_layer: int | None  # the hidden states are those after this many layers; None: it has no such loss
    align_shape: tuple[int, int]  # (P, C) of an image's features

    def alignment(self, states: Tensor, features: Tensor) -> Mapping[str, Tensor]:
        """Return named losses, as `GenerationPath.losses` does.

        ``states`` (N, num_tokens, D) are at the image's positions, ``features`` (N, P, C) the encoder's.
        """
        ...


@runtime_checkable
class HidesCondition(GenerationPath, Protocol):
    """A generation path whose unconditional rows see nothing of the dropped condition but its first position.

    Training then hides dropped conditions too, with a backbone that `MasksPositions`.
    """

    hidden_condition: bool  # False: pads in place of the condition are seen, as Janus' path does


@runtime_checkable
class MasksPositions(Backbone, Protocol):
    """A backbone that hides positions from all others in training: its forward takes ``hidden`` (B, T)."""

    masks_positions: bool  # False: not as it is configured


@runtime_checkable
class ReturnsLayer(Backbone, Protocol):
    """A backbone that also returns the hidden states after one of its layers."""

    num_layers: int  # that `layer` counts

    def forward(self, x: Tensor, *, positions: Tensor, cache: Any = None, layer: int | None = None) -> Any:
        """Return hidden states as `Backbone.forward` does; with ``layer``, also those after that layer.

        The pair (hidden states, states after the layer), both (B, T, D), is returned without a cache alone.
        ``layer`` is 1 to ``num_layers``.
        """
        ...


@runtime_checkable
class ReadsPretrained(Protocol):
    """A component that maps names of pretrained weights to its own.

    Without this method, the names in the files of ``pretrained:`` must be the component's own.
    """

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the component's own names and tensors; ``weights`` reads lazily, by the file's names.

        Names that are never read are reported as unexpected. A weight of the component that is not yielded
        is missing, and a name that the component does not have is unexpected; both are errors. Yield
        everything in the component's part of a file (`janus_modular.belongs_to`), except for weights that
        are known to be unused: otherwise weights of another architecture could load without an error.
        """
        ...


class LoadedWeights(NamedTuple):
    """The result of `LoadsPretrained.load_pretrained`."""

    loaded: int  # number of tensors
    missing: list[str]  # weights of the component that the files lack
    unexpected_keys: list[str]  # names in the files that belong to other components


@runtime_checkable
class LoadsPretrained(Protocol):
    """A component that loads its pretrained weights itself, for example with a library's own loader.

    If it also has the method of `ReadsPretrained`, that method is not called.
    """

    def load_pretrained(self, path: Path) -> LoadedWeights:
        """Load the folder or file that ``pretrained:`` names.

        Raises:
            CheckpointError: the weights do not fit; missing weights may also be returned.
        """
        ...


@runtime_checkable
class PartiallyTrainable(Protocol):
    """A component that a stage trains only in part by default, such as adapters of a frozen backbone."""

    def trainable_parameters(self) -> Iterable[str]:
        """Return the names of the submodules and parameters that train where a stage names the component.

        Other parameters train only where a stage names them directly.
        """
        ...


@runtime_checkable
class Merges(Protocol):
    """A component that wraps another during training and can be merged into that component's weights.

    ``export`` and ``convert --merge`` merge it.
    """

    def merged(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[ComponentSpec, Mapping[str, Callable[[], Tensor]]]:
        """Return the wrapped component's spec, and a function that makes each of its tensors, by name.

        ``weights`` are this component's own, by its own names; they are read lazily. The component may be on
        the meta device.
        """
        ...


@runtime_checkable
class TranslatesToOnnx(Protocol):
    """A component that uses an operator which has no translation from torch to ONNX.

    Components that `torch.export` traces into torch's own operators do not need it.
    """

    def onnx_translations(self) -> Mapping[Callable[..., Any], Callable[..., Any]]:
        """Return, for operators (``torch.ops.acme.swish.default``), functions that write them in ONNX.

        A function takes the operator's arguments, with tensors as values of a graph under construction, and
        returns the result of onnxscript operators. Only standard ONNX operators run everywhere.
        """
        ...


@runtime_checkable
class HidesPositions(RowCache, Protocol):
    """A cache that hides positions of its rows: `begin` leaves them out of the mask it returns."""

    hidden: Tensor | None  # (B, T) bool, of rows from their first position on; set before each pass


@runtime_checkable
class CopiesRows(RowCache, Protocol):
    """A cache whose rows can be copied, so that an engine reads what several prompts begin with only once."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a row to another row; its length is set afterwards."""
        ...
