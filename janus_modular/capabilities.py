"""Optional capabilities of components, found with ``isinstance``: methods beyond those of their slot.

Shapes as in ``janus_modular.interfaces``. Nothing has to be inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from janus_modular.interfaces import Adaptor, Backbone, GenerationPath, RowCache

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from janus_modular.graph_specs import TensorSpec
    from janus_modular.interfaces import ComponentSpec
    from janus_modular.sequence import EncodedSpec


@runtime_checkable
class EncodesImages(GenerationPath, Protocol):
    """A generation path whose encoded images (codes or latents) samples may contain and drawings return.

    `GenerationPath.targets` must return a tensor (N, ...) of the declared shape and dtype.
    """

    encoded: EncodedSpec  # of one image


@runtime_checkable
class DrawsOtherSizes(GenerationPath, Protocol):
    """A generation path that draws images of sizes other than its own, with the same weights."""

    def sized(self, height: int, width: int) -> GenerationPath:
        """Return this path for another size; its modules are the same objects.

        Raises:
            ValueError: a component cannot take the size; says which, and why.
        """
        ...


@runtime_checkable
class DeclaresCache(Backbone, Protocol):
    """A backbone with a cache of other tensors than keys and values, such as states of recurrent layers.

    Sessions and exported graphs keep the declared tensors from step to step; `new_cache` returns a
    `janus_modular.TensorCache` of them.

    The first axis of a tensor is "rows". Another axis may be "capacity": the tensor then has an entry for
    each position. A tensor without this axis is a state. All other axes are sizes. The dtype is "model" or
    "float32".
    """

    cache_tensors: Sequence[TensorSpec]  # the tensors, with unique names


@runtime_checkable
class DeclaresPositions(Backbone, Protocol):
    """A backbone with multimodal rotary embeddings (M-RoPE): positions have ids on several axes.

    The argument ``positions`` of `forward` is then (1 + P, B, T): first the index in the sequence, then the
    ids on P axes, which `janus_modular.PositionRule` assigns.
    """

    position_axes: Sequence[str]  # P of temporal, height, width, in the order of the ids


@runtime_checkable
class AttendsTogether(Backbone, Protocol):
    """A backbone with bidirectional attention within blocks of positions; other positions are causal.

    ``forward`` has the argument ``together`` (B, T), or None: positions of a sequence with the same number
    above 0 attend to each other in both directions; 0 is causal.
    """

    def refuse_together(self) -> str:
        """Return why this backbone, as configured, does not support blocks; "" if it does."""
        ...


@runtime_checkable
class ChecksPacking(Backbone, Protocol):
    """A backbone of which some configs do not keep the sequences of a row apart, and cannot be trained."""

    def refuse_packing(self) -> str:
        """Return why this backbone, as configured, cannot be trained on packed rows; "" if it can.

        It is asked before a run, on the meta device: weights have no values.
        """
        ...


@runtime_checkable
class ReshapesGrid(Adaptor, Protocol):
    """An adaptor that changes the grid: its positions have other rows and columns than the features."""

    def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of positions for a grid of features.

        Return (1, P') if positions correspond to no place of the image.
        """
        ...


@runtime_checkable
class DerivesWeights(GenerationPath, Protocol):
    """A generation path with weights that begin as a function of its frozen submodules: a table of codes.

    A stage that trains such a submodule keeps them so, unless they had been trained before.
    """

    def derived_weights(self) -> Mapping[str, Tensor]:
        """Return the values with which these weights begin, by their names in the path."""
        ...


@runtime_checkable
class HasLogProbabilities(GenerationPath, Protocol):
    """A generation path that computes log-probabilities of given codes, as policy gradients need."""

    def log_probabilities(
        self, hidden: Tensor, targets: Tensor, *, guidance: float, temperature: float
    ) -> Tensor:
        """Return the log-probabilities (N, P) of sampling the targets (N, ...), natural logarithms.

        ``hidden`` (R, P, D) are the hidden states that predict the positions: N conditional rows, then N
        unconditional rows; for guidance 1, only N conditional rows.
        """
        ...


@runtime_checkable
class AlignsHiddenStates(GenerationPath, Protocol):
    """A generation path that aligns hidden states inside the backbone with image features (REPA).

    The features are those of the target image from the understanding encoder, without gradients. The encoder
    must take images of the path's size, and the backbone must be one that `ReturnsLayer`.
    """

    align_layer: int | None  # number of the backbone layer, counted from 1; None: no such loss
    align_shape: tuple[int, int]  # (P, C) of the features of an image

    def alignment(self, states: Tensor, features: Tensor) -> Mapping[str, Tensor]:
        """Return the losses by name, as `GenerationPath.losses` does.

        ``states`` (N, num_tokens, D) are the hidden states of the layer at the positions of the images,
        ``features`` (N, P, C) those of the encoder.
        """
        ...


@runtime_checkable
class HidesCondition(GenerationPath, Protocol):
    """A generation path whose unconditional rows mask the condition, except for its first position.

    Training then masks dropped conditions too, which needs a backbone that `MasksPositions`.
    """

    hidden_condition: bool  # False: rows attend to padding in place of the condition, as in Janus


@runtime_checkable
class MasksPositions(Backbone, Protocol):
    """A backbone whose `forward` has the argument ``hidden`` (B, T): True masks a position for all others."""

    masks_positions: bool  # False: not supported with this config


@runtime_checkable
class ReturnsLayer(Backbone, Protocol):
    """A backbone that also returns the hidden states after one of its layers."""

    num_layers: int  # maximum of ``layer``

    def forward(self, x: Tensor, *, positions: Tensor, cache: Any = None, layer: int | None = None) -> Any:
        """Return hidden states as `Backbone.forward` does; with ``layer``, also those after that layer.

        ``layer`` is 1 to ``num_layers``; the result is then the pair (hidden states, states after the layer),
        both (B, T, D). Not called with both ``layer`` and a cache.
        """
        ...


@runtime_checkable
class ReadsPretrained(Protocol):
    """A component that maps names of pretrained weights to those of its ``state_dict``.

    Without this method, the files of ``pretrained:`` must have the names of the ``state_dict``.
    """

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in the ``state_dict``, tensor); ``weights`` has the file's names and reads lazily.

        A name of the ``state_dict`` that is not yielded is a missing weight, and a yielded name that the
        ``state_dict`` lacks is an unexpected one: both are errors. Names of the file that are not read are
        only reported. Therefore yield all weights in the component's part of a file
        (`janus_modular.belongs_to`), except for known unused ones: otherwise, weights of another architecture
        could load without an error.
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

    Its method `read_pretrained`, if there is one, is not called.
    """

    def load_pretrained(self, path: Path) -> LoadedWeights:
        """Load the folder or file that ``pretrained:`` names.

        Raises:
            CheckpointError: the weights do not fit. (Missing weights may be returned instead.)
        """
        ...


@dataclass(frozen=True)
class Reconstruction:
    """The result of `ReconstructsImages.reconstruct`."""

    pixels: Tensor  # (N, 3, H, W) in ``value_range``, not clipped; gradients reach encoder and decoder
    losses: Mapping[str, Tensor]  # scalars that regularise the encoded images, weighted: commitment, kl ...
    distance: Literal["l1", "l2"] = "l2"  # the component's own measure of pixels: absolute, or squared
    codes: Tensor | None = None  # (N, P) or (N, P, S) code ids, where images are encoded as codes

    def pixel_loss(self, pixels: Tensor, distance: Literal["l1", "l2"] | None = None) -> Tensor:
        """Return the mean distance (scalar) from the images (N, 3, H, W); None: the component's own."""
        difference = self.pixels - pixels.to(self.pixels.dtype)
        absolute = (distance or self.distance) == "l1"
        return difference.abs().mean() if absolute else difference.square().mean()

    def named_losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return ``pixels``, the component's own distance from the images, and its further losses."""
        return {"pixels": self.pixel_loss(pixels), **self.losses}


@runtime_checkable
class ReconstructsImages(Protocol):
    """An image tokenizer or autoencoder that gives the images it makes of images, with gradients.

    An objective compares them with the images, by its own measures. ``losses`` of the slot's interface are
    the component's choice of such a measure, and what regularises it.
    """

    value_range: tuple[float, float]  # of pixels, in and out

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode pixels (N, 3, H, W) in ``value_range`` and decode them, as in training.

        In training mode, running statistics (moving averages of a codebook, say) may be updated.
        """
        ...


@runtime_checkable
class PartiallyTrainable(Protocol):
    """A component of which only some parameters are trained by default, such as LoRA adapters."""

    def trainable_parameters(self) -> Iterable[str]:
        """Return the paths of the submodules and parameters that are trained if `learn` lists the component.

        Other parameters are trained only if `learn` lists them.
        """
        ...


@runtime_checkable
class Merges(Protocol):
    """A component that wraps another one and can be merged into the weights of that one, such as LoRA.

    ``export`` and ``convert --merge`` call it.
    """

    def merged(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[ComponentSpec, Mapping[str, Callable[[], Tensor]]]:
        """Return the wrapped component's spec, and for each of its weight names a function that computes it.

        ``weights`` are this component's weights, under the names of its ``state_dict``; they are read lazily.
        The component may be on the meta device.
        """
        ...


@runtime_checkable
class DeclaresFlops(Protocol):
    """A component that states what its forward pass costs, where torch's counter cannot see it.

    Other components are run on the meta device, under `torch.utils.flop_counter`.
    """

    def forward_flops(self, tokens: int) -> int:
        """Return the floating-point operations of `forward` on one image or sequence of its own tokens.

        ``tokens``: the features of an image for an encoder or an adaptor, the positions of one sequence for a
        backbone (without logits), those of one image for a generation path (embeddings and losses).
        """
        ...


@runtime_checkable
class TranslatesToOnnx(Protocol):
    """A component with custom operators, for which it provides the translation to ONNX.

    Not needed for components that `torch.export` traces into torch's own operators.
    """

    def onnx_translations(self) -> Mapping[Callable[..., Any], Callable[..., Any]]:
        """Return the translation function of each operator, such as ``torch.ops.acme.swish.default``.

        A function gets the operator's arguments (tensors as values of an ONNX graph) and returns the results
        of onnxscript operators. Use standard ONNX operators: others do not run in every runtime.
        """
        ...


@runtime_checkable
class HidesPositions(RowCache, Protocol):
    """A cache that masks hidden positions: they are False in the attention mask that `begin` returns."""

    hidden: Tensor | None  # (B, T) bool, True: hidden; from the rows' first position on, set before each pass


@runtime_checkable
class CopiesRows(RowCache, Protocol):
    """A cache whose rows can be copied, so that an engine prefills a common prefix of prompts only once."""

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of row ``source`` to ``target``; the caller sets its length."""
        ...
