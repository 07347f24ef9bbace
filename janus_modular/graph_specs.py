"""Declarations of the graphs that export compiles: names, functions, inputs and outputs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

AXES = ("images", "rows", "tokens", "capacity")
"""Dynamic axes: images of a batch, batch rows of the backbone, positions of one call, and positions of a row
of the KV cache."""

DTYPES = ("model", "float32", "int64", "uint8", "bool")
"""Dtypes of a `TensorSpec`; "model" is the dtype in which the model computes."""

CORE_GRAPHS = ("understand", "embed", "backbone", "sample_text")
"""Graphs of every model, beside those of its generation path."""

GraphRole = Literal["sample", "decode", "encode", "embed", "other"]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    A dimension is a number, the name of an axis (`AXES`), or a multiple of an axis: ``"3*images"``; in
    ``understand``, also a product of two: ``"image_rows*image_columns"``. ``"rows"`` is a multiple of
    ``"images"`` that the sampler chooses: two with guidance.
    """

    name: str  # unique among the graph's tensors
    dtype: str  # of DTYPES; in a compiled graph, float16, bfloat16, ... instead of "model"
    shape: tuple[int | str, ...]  # numbers, axes, and their products

    @property
    def axes(self) -> list[str]:
        """The names of the axes in the shape."""
        return [axis for size in self.shape if isinstance(size, str) for axis in axes_in(size)]

    def sized(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with these sizes of the axes."""
        return tuple(
            prod(axes[part] if part in axes else int(part) for part in size.split("*"))
            if isinstance(size, str)
            else size
            for size in self.shape
        )

    def measure(self, shape: Sequence[int]) -> dict[str, int]:
        """Return the sizes of the axes for a tensor of this shape.

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


def axes_in(dimension: str) -> list[str]:
    """Return the names of the axes in a dimension: of ``"3*images"``, only images."""
    return [part for part in dimension.split("*") if not part.isdecimal()]


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
    """A function that a sampler calls by its name, and that export compiles into a graph.

    The role determines how `verify` compares the compiled graph with torch:

    - "sample": outputs of ids must be equal;
    - "decode": pixels must differ by at most 1 of 255;
    - "encode": the inputs are pixels from "decode"; a sampler need not call it;
    - "embed": the inputs are outputs of "encode", which become inputs of the backbone, as by the path's
      `embed`; a sampler need not call it;
    - "other": the inputs are those of the sampler's calls.

    Floating-point outputs must be close in all roles. An output named ``x`` is the next input of the backbone
    (rows, D); runtimes keep it on the device.
    """

    name: str  # lower-case letters, digits and underscores
    function: Callable[..., Any]  # takes the inputs in order; returns a tensor, or a tuple of the outputs
    inputs: tuple[TensorSpec, ...]  # in the order of the function's arguments
    outputs: tuple[TensorSpec, ...]  # in the order of its results
    role: GraphRole = "other"  # how the graph is verified: sample, decode, encode, embed, other


@dataclass(frozen=True)
class GraphSignature:
    """Inputs and outputs of a graph that `Session.run` calls, and its role in the generation path."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    role: str = "other"  # a `GraphRole`


def graph_of_role(signatures: Mapping[str, GraphSignature], role: GraphRole) -> str | None:
    """Return the name of the one graph of a role; None if there is none, or more than one."""
    names = [name for name, signature in signatures.items() if signature.role == role]
    return names[0] if len(names) == 1 else None
