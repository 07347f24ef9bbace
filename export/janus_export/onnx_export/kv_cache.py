"""The cache in graphs: input tensors, and the same tensors after new positions as outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from janus_export.errors import ExportError
from janus_modular import Backbone, DeclaresCache, TensorSpec
from janus_modular.model.model import stack_positions

TENSOR_SCATTER = 24
"""The first opset with TensorScatter: row-wise writes into a cache, in place if a runtime supports it."""


class GraphCache:
    """A `janus_modular.StateCache` in an exported graph; entries are written by TensorScatter nodes."""

    def __init__(
        self, specs: Sequence[TensorSpec], past: Sequence[Tensor], inputs: Mapping[str, Tensor]
    ) -> None:
        """Take the tensors ``past``, and the graph's other inputs by name.

        Of these, ``mask`` (R, 1, T, S) and ``write_index`` (R,), where each row writes, are there for tensors
        with entries, and ``counts`` (R,) for states.
        """
        self.specs = {spec.name: spec for spec in specs}
        self.past = dict(zip(self.specs, past, strict=True))
        self.inputs = inputs
        self.written: dict[str, Tensor] = {}

    def begin(self, tokens: int, together: Tensor | None = None) -> Tensor:
        """Return the attention mask, which the host computed."""
        return self.inputs["mask"]

    def kept(self, tokens: int) -> Tensor:
        """Return which positions are kept (R, T)."""
        counts = self.inputs["counts"]
        return torch.arange(tokens, device=counts.device) < counts[:, None]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return the whole cache of the layer."""
        return self.append(f"key_{layer}", keys), self.append(f"value_{layer}", values)

    def append(self, name: str, new: Tensor) -> Tensor:
        """Write the entries of new positions; return the whole tensor."""
        old = self.past[name]
        self.written[name] = torch.onnx.ops.symbolic(
            "TensorScatter",
            (old, new, self.inputs["write_index"]),
            {"axis": self.specs[name].shape.index("capacity"), "mode": "linear"},
            dtype=old.dtype,
            shape=old.shape,
            version=TENSOR_SCATTER,
        )
        return self.written[name]

    def read(self, name: str) -> Tensor:
        """Return a state (R, ...)."""
        return self.past[name]

    def write(self, name: str, state: Tensor) -> None:
        """Set a state (R, ...)."""
        self.written[name] = state

    def present(self) -> list[Tensor]:
        """Return the tensors after writing, in the order they came in.

        Raises:
            ExportError: the backbone writes none of this name.
        """
        if missing := sorted(set(self.specs) - set(self.written)):
            raise ExportError(
                f"the backbone does not write {', '.join(missing)} of its cache; expected all that its"
                " cache_tensors declares"
            )
        return [self.written[name] for name in self.specs]

    def advance(self, counts: Tensor) -> None:
        """Do nothing: the host keeps the lengths."""

    def get_seq_length(self, layer: int = 0) -> int:
        """Return a length for transformers; it is not used, because positions are always given."""
        return 0


class Shapes:
    """A cache that records only shapes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lengths = torch.zeros(1, dtype=torch.int64)
        self.capacity = 1
        self.shapes: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}

    def begin(self, tokens: int, together: Tensor | None = None) -> Tensor:
        """Return the mask of one token that attends to itself."""
        return torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=self.device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Record the numbers of heads and head dimensions."""
        self.shapes[layer] = ((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))
        return keys, values

    def advance(self, counts: Tensor) -> None:
        """Do nothing: only shapes are recorded."""

    def get_seq_length(self, layer: int = 0) -> int:
        """Return 0: no states are recorded."""
        return 0


CACHES = (GraphCache, Shapes)


def cache_tensors(backbone: Backbone) -> list[TensorSpec]:
    """Return the tensors of a backbone's cache: those that it declares, or its keys and values.

    Keys and values are ``key_0``, ``value_0``, ... (rows, heads, capacity, head dim); their sizes are those
    of a forward pass of one position. The backbone's parameters may be fake; call it under their fake mode.

    Raises:
        ExportError: the backbone writes no keys and values, so a step would not depend on earlier positions.
    """
    if isinstance(backbone, DeclaresCache):
        return list(backbone.cache_tensors)
    weight = next(backbone.parameters())  # type: ignore[attr-defined]  # components are modules
    cache = Shapes(weight.device)
    x = torch.zeros(1, 1, backbone.hidden_size, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        first = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        backbone(x, positions=stack_positions(backbone, first), cache=cache)
    if not cache.shapes:
        raise ExportError(
            f"{type(backbone).__name__} wrote no keys and values into its cache, and declares no other state"
            " that an export could keep between steps. Choose a backbone with attention layers, such as llama"
            " or qwen3; or declare `cache_tensors` in your own (janus_modular.DeclaresCache)."
        )
    return [
        TensorSpec(f"{name}_{layer}", "model", ("rows", heads, "capacity", size))
        for layer in sorted(cache.shapes)
        for name, (heads, size) in zip(("key", "value"), cache.shapes[layer], strict=True)
    ]
