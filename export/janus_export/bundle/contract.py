"""The inputs and outputs of a graph, as declared in a manifest, for runtimes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_modular import NotFiniteError, PromptError
from janus_modular.graph_specs import TensorSpec

MAGNITUDE = "magnitude"
"""The output (N,) of a graph that decodes images: their mean magnitude before values are clipped."""


@dataclass(frozen=True)
class GraphContract:
    """Inputs and outputs of a graph, in order, and which outputs are inputs written in place."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: Mapping[str, str]  # output -> input
    states: Mapping[str, str] = field(default_factory=dict)  # output -> input, in memory of their own

    @classmethod
    def declared(cls, name: str, record: Mapping[str, Any]) -> GraphContract:
        """Read a contract of any variant: ``model`` stands for the dtype of each. No graph is opened."""
        return cls.read(
            name, record, {t["name"]: t["dtype"] for t in (*record["inputs"], *record["outputs"])}
        )

    def measure(self, shapes: Iterable[Sequence[int]]) -> dict[str, int]:
        """Return the lengths of the axes for inputs of these shapes, in order.

        Raises:
            PromptError: there are more or fewer inputs.
            ValueError: a shape does not fit the graph's input.
        """
        axes = dict[str, int]()
        for spec, shape in self.paired(list(shapes)):
            axes |= spec.measure(shape)
        return axes

    def paired(self, values: Sequence[Any]) -> list[tuple[TensorSpec, Any]]:
        """Return each input with its value.

        Raises:
            PromptError: there are more or fewer values.
        """
        if len(values) != len(self.inputs):
            names = ", ".join(f"{spec.name} {spec.shape}".replace("'", "") for spec in self.inputs)
            raise PromptError(
                f"the graph '{self.name}': found {len(values)} inputs; expected {len(self.inputs)}: {names}."
            )
        return list(zip(self.inputs, values, strict=True))

    @property
    def returns_x(self) -> bool:
        """True if the graph samples: besides ids, it returns the next input ``x`` (rows, D) of each row."""
        return any(tensor.name == "x" and len(tensor.shape) == 2 for tensor in self.outputs)

    @classmethod
    def read(cls, name: str, record: Mapping[str, Any], dtypes: Mapping[str, str]) -> GraphContract:
        """Read a contract from a manifest's entry; ``dtypes``: those of a variant, by tensor name."""

        def tensors(side: str) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(tensor["name"], dtypes[tensor["name"]], tuple(tensor["shape"]))
                for tensor in record[side]
            )

        return cls(
            name,
            tensors("inputs"),
            tensors("outputs"),
            dict(record.get("aliases", ())),
            dict(record.get("states", ())),
        )


def check_magnitude(graph: str, magnitude: NDArray[Any]) -> None:
    """Raise an error for images (N,) that were decoded from values which are NaN or infinite.

    Raises:
        NotFiniteError: a magnitude is NaN or infinite: the pixels would be black, white or noise.
    """
    overflowed = np.flatnonzero(~np.isfinite(magnitude)).tolist()
    if overflowed:
        raise NotFiniteError(
            f"the graph '{graph}' decoded values that are NaN or infinite in {len(overflowed)} of"
            f" {len(magnitude)} images; expected finite numbers, before they are clipped to 0..255. Its"
            " weights, or what it computes from them, do not fit into its dtype: try the variant fp32 or bf16"
            " (`janus-modular export MODEL BUNDLE --precision fp32`); where that fails too, the checkpoint"
            " itself is damaged."
        )
