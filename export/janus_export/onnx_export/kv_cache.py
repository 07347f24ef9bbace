"""The KV cache in graphs: input tensors, and the same tensors with new slots written as outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from janus_export.errors import ExportError
from janus_modular import Backbone

TENSOR_SCATTER = 24
"""The first opset with TensorScatter: row-wise writes into a cache, in place if a runtime supports it."""


class GraphCache:
    """A `janus_modular.Cache` whose writes are TensorScatter nodes of the exported graph."""

    def __init__(self, mask: Tensor, write_index: Tensor, past: Sequence[Tensor]) -> None:
        """Take the mask (R, 1, T, S), where each row writes (R,), and keys and values in turn."""
        self.mask = mask
        self.lengths = write_index
        self.capacity = mask.shape[-1]
        self.past = list(past)
        self.written: dict[int, Tensor] = {}

    def begin(self, tokens: int) -> Tensor:
        """Return the attention mask, which the host computed."""
        return self.mask

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return the whole cache of the layer."""
        return self._write(2 * layer, keys), self._write(2 * layer + 1, values)

    def _write(self, index: int, new: Tensor) -> Tensor:
        old = self.past[index]
        self.written[index] = torch.onnx.ops.symbolic(
            "TensorScatter",
            (old, new, self.lengths),
            {"axis": 2, "mode": "linear"},
            dtype=old.dtype,
            shape=old.shape,
            version=TENSOR_SCATTER,
        )
        return self.written[index]

    def present(self) -> list[Tensor]:
        """Return the caches after writing, in the order they came in."""
        return [self.written[index] for index in sorted(self.written)]

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

    def begin(self, tokens: int) -> Tensor:
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


def cache_shapes(backbone: Backbone) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return (heads, head dim) of keys and of values for every layer, from a forward pass of one position.

    The backbone's parameters may be fake; call it under their fake mode.

    Raises:
        ExportError: the backbone writes no keys and values, so a step would not depend on earlier positions.
    """
    weight = next(backbone.parameters())  # type: ignore[attr-defined]  # components are modules
    cache = Shapes(weight.device)
    x = torch.zeros(1, 1, backbone.hidden_size, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        backbone(x, positions=torch.zeros(1, 1, dtype=torch.int64, device=weight.device), cache=cache)
    if not cache.shapes:
        raise ExportError(
            f"{type(backbone).__name__} wrote no keys and values into its cache, the only state that an"
            " export keeps between steps. Choose a backbone with attention layers, such as llama or qwen3."
        )
    return [cache.shapes[layer] for layer in sorted(cache.shapes)]
