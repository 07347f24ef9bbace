"""Declarations of the graphs that export compiles: their names, functions, inputs and outputs.

torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

AXES = ("images", "rows", "tokens", "capacity")
"""Dynamic axes: images drawn together, rows in the backbone's batch, positions that are fed at once, and
positions of a row of the KV cache."""

DTYPES = ("model", "float32", "int64", "uint8", "bool")
"""Dtypes of a `TensorSpec`; "model" is the dtype that the model computes in."""

CORE_GRAPHS = ("understand", "embed", "backbone", "sample_text")
"""Graphs of every model, beside those of its generation path."""

GraphRole = Literal["sample", "decode", "encode", "embed", "other"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    A dimension is a size, the name of an axis (`AXES`), or a multiple of an axis: ``"3*images"``. ``"rows"``
    is a multiple of ``"images"`` that the sampler chooses.
    """

    name: str  # unique among the graph's tensors
    dtype: str  # of DTYPES; of a graph that has been compiled: float16, bfloat16, ... instead of "model"
    shape: tuple[int | str, ...]  # sizes, axes, and multiples of axes

    @property
    def axes(self) -> list[str]:
        """The names of the axes in the shape."""
        return [factor_and_axis(size)[1] for size in self.shape if isinstance(size, str)]

    def sized(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape for these lengths of axes."""
        factors = [factor_and_axis(size) if isinstance(size, str) else (size, "") for size in self.shape]
        return tuple(factor * axes[axis] if axis else factor for factor, axis in factors)

    def measure(self, shape: Sequence[int]) -> dict[str, int]:
        """Return the lengths of the axes in a tensor of this shape.

        Raises:
            ValueError: the shape is not the declared one.
        """
        axes = dict[str, int]()
        fits = len(shape) == len(self.shape)
        for declared, size in zip(self.shape, shape, strict=False):
            if isinstance(declared, str):
                factor, axis = factor_and_axis(declared)
                fits = fits and size % factor == 0 and axes.setdefault(axis, size // factor) == size // factor
            else:
                fits = fits and declared == size
        if not fits:
            raise ValueError(f"'{self.name}': expected the shape {self.shape}, got {tuple(shape)}")
        return axes


def factor_and_axis(dimension: str) -> tuple[int, str]:
    """Split a dimension: ``"3*images"`` into (3, "images"), ``"rows"`` into (1, "rows").

    Raises:
        ValueError: there is a factor, and it is not a number.
    """
    factor, _, axis = dimension.rpartition("*")
    return int(factor or 1), axis


def sample_text_tensors(
    vocab_size: int, hidden_size: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of the graph ``sample_text``."""
    return (
        TensorSpec("hidden", "model", ("rows", hidden_size)),
        TensorSpec("noise", "float32", ("rows", vocab_size)),
        TensorSpec("temperature", "float32", ()),
        TensorSpec("top_k", "int64", ()),
        TensorSpec("top_p", "float32", ()),
    ), (TensorSpec("ids", "int64", ("rows",)), TensorSpec("x", "model", ("rows", hidden_size)))


@dataclass(frozen=True)
class GraphSpec:
    """A function that a sampler runs by name, and that export compiles into a graph.

    The role says how the compiled graph is verified. Ids that "sample" chooses have to be the same, pixels
    that "decode" makes at most 1 of 255 apart, and other numbers close. "encode" reads the pixels that
    "decode" has made, and "embed" turns what "encode" has made into inputs of the backbone, as the path's
    `embed` does; a sampler need not run these two. Every other graph gets what the sampler gives it.

    An output called ``x`` is the backbone's next input, an embedding a row: runtimes keep it on the device.
    """

    name: str  # lower-case letters, digits and underscores
    function: Callable[..., Any]  # takes the inputs in order; returns a tensor, or a tuple of the outputs
    inputs: tuple[TensorSpec, ...]  # in the order of the function's arguments
    outputs: tuple[TensorSpec, ...]  # in the order of its results
    role: GraphRole = "other"  # how the graph is verified: sample, decode, encode, embed, other


@dataclass(frozen=True)
class GraphSignature:
    """The inputs and outputs of a graph that `run` calls, in order, and its role in the generation path."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    role: str = "other"  # a `GraphRole`
