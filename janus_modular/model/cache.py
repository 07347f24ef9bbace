"""The cache of a backbone in torch: rows with lengths of their own, keys and values, recurrent states.

transformers' caches have one length for all rows. Here, row r writes its next positions at ``lengths[r]``,
without padding, and attends to the entries up to its own position. Entries beyond a row's length are masked,
and overwritten later. A state has no entries: it is that after the row's last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from janus_modular.capabilities import DeclaresCache
from janus_modular.errors import PromptError
from janus_modular.graph_specs import TensorSpec
from janus_modular.interfaces import Backbone
from janus_modular.session_errors import refuse_cut_states


class TensorCache:
    """A `janus_modular.RowCache` and `janus_modular.StateCache`; memory is allocated when it is first used.

    One entry behind the last position is never attended to: padding beyond ``max_seq_len`` is written there.
    """

    def __init__(
        self,
        rows: int,
        max_seq_len: int,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        tensors: Sequence[TensorSpec] = (),
    ) -> None:
        """Prepare ``rows`` empty rows.

        ``tensors`` are those that the backbone declares (`janus_modular.DeclaresCache`), "model" being
        ``dtype``; none: keys and values of any layer, as `update` gets them.
        """
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.max_seq_len = max_seq_len
        self.device, self.dtype = device, dtype or torch.get_default_dtype()
        self.specs = {spec.name: spec for spec in tensors}
        self.states = [spec.name for spec in tensors if "capacity" not in spec.shape]
        self.total_rows, self.rows = rows, slice(None)
        self.parent: TensorCache | None = None  # of a selection
        self.tensors: dict[str, Tensor] = {}  # of all rows, by name
        self.written: dict[str, Tensor] = {}  # states after this forward pass, until `advance`
        self.counts: Tensor | None = None  # (B,) positions of this pass that are kept; None: all
        self.tokens = 0  # positions of this pass
        self.end = 0  # longest row, with the positions of this pass
        self.index = torch.empty(0)
        self.hidden: Tensor | None = None  # (B, T) positions that no other attends to; see `HidesPositions`

    def keep(self, counts: Tensor) -> None:
        """Declare that the next forward pass keeps the first ``counts`` (B,) of its positions."""
        self.counts = counts.cpu()
        self.written.clear()

    def begin(self, tokens: int, together: Tensor | None = None) -> Tensor:
        """Choose the entries of ``tokens`` more positions; return their attention mask (B, 1, T, S)."""
        index = self.lengths[:, None] + torch.arange(tokens)  # (B, T)
        self.end = int(self.lengths.max()) + tokens
        if self.end > self.max_seq_len:
            index, self.end = index.clamp(max=self.max_seq_len), self.max_seq_len + 1
        self.index = index.to(self.device)
        entries = torch.arange(self.end, device=self.device)
        mask = entries <= self.index[:, :, None]  # (B, T, S)
        if together is not None:
            seen = same_block(together)  # (B, T, T)
            mask = mask | torch.zeros_like(mask).scatter(2, self.index[:, None].expand_as(seen), seen)
        if self.hidden is not None:
            hidden = self.hidden[:, : self.end]
            mask[:, :, : hidden.shape[1]] &= ~hidden[:, None]
        return mask.unsqueeze(1)

    def kept(self, tokens: int) -> Tensor:
        """Return which of ``tokens`` more positions are kept (B, T)."""
        self.tokens = tokens
        counts = torch.full_like(self.lengths, tokens) if self.counts is None else self.counts
        return (torch.arange(tokens) < counts[:, None]).to(self.device)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values (B, heads, T, head_dim); return those of all positions so far."""
        return self.append(f"key_{layer}", keys), self.append(f"value_{layer}", values)

    def append(self, name: str, new: Tensor) -> Tensor:
        """Write the entries of new positions, and return those of all positions so far.

        Raises:
            ValueError: the shape is not the declared one.
        """
        axis = self._declared(name, new, self.index.shape[1]).shape.index("capacity") if self.specs else 2
        if name not in self.tensors:
            shape = [*new.shape]
            shape[0], shape[axis] = self.total_rows, self.max_seq_len + 1
            self.tensors[name] = new.new_zeros(shape)
        entries = self._of_rows(name)
        size = [length if i in (0, axis) else 1 for i, length in enumerate(new.shape)]
        entries.scatter_(axis, self.index.view(size).expand_as(new), new)
        return entries.narrow(axis, 0, self.end)

    def read(self, name: str) -> Tensor:
        """Return a state (B, ...): zeros in rows without positions."""
        spec = self._spec(name)
        if name not in self.tensors:
            dtype = self.dtype if spec.dtype == "model" else getattr(torch, spec.dtype)
            shape = spec.sized({"rows": self.total_rows})
            self.tensors[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        return self._of_rows(name)

    def write(self, name: str, state: Tensor) -> None:
        """Set a state (B, ...) to that after the kept positions; `advance` makes it the row's.

        Raises:
            ValueError: the shape or the dtype is not the declared one.
        """
        self._declared(name, state, 0)
        if state.dtype != (expected := self.read(name).dtype):
            raise ValueError(f"the cache's '{name}': found {state.dtype}; expected {expected}, as declared")
        self.written[name] = state

    def advance(self, counts: Tensor) -> None:
        """Keep the first ``counts`` (B,) of the positions written last.

        Raises:
            PromptError: a row would hold more than ``max_seq_len``.
            ValueError: there are states, of other positions: `keep` was called with other counts.
        """
        counts = counts.cpu()
        lengths = self.lengths + counts
        if (end := int(lengths.max())) > self.max_seq_len:
            raise PromptError(
                f"{end} positions do not fit into a session of {self.max_seq_len}: shorten the prompt, ask"
                " for fewer tokens, or open the session with a larger max_seq_len"
            )
        expected = torch.full_like(counts, self.tokens) if self.counts is None else self.counts
        if self.written and not torch.equal(counts, expected):
            raise ValueError(
                f"advance: found counts {counts.tolist()}; expected {expected.tolist()}, after which the"
                " states were written: call keep(counts) before the forward pass"
            )
        for name, state in self.written.items():
            self._of_rows(name).copy_(state)
        self.written.clear()
        self.counts = None
        self._set_lengths(lengths)

    def truncate(self, lengths: Tensor) -> None:
        """Cut rows back to ``lengths`` (B,); what lay behind them is overwritten.

        Raises:
            PromptError: there are states, of which only those after the last positions are known.
        """
        lengths = lengths.cpu()
        if self.states:
            refuse_cut_states(lengths.numpy(), self.lengths.numpy())
        for name in set(self.states) & set(self.tensors):
            self._of_rows(name)[(lengths == 0).to(self.device)] = 0
        self._set_lengths(lengths)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` entries of a row to another row; its own length does not change."""
        for name, tensor in self.tensors.items():
            axis = self.specs[name].shape.index("capacity") if self.specs else 2
            tensor[target].narrow(axis - 1, 0, length).copy_(tensor[source].narrow(axis - 1, 0, length))

    def select(self, rows: slice) -> TensorCache:
        """Return a cache of consecutive rows alone, over the same memory."""
        selected = copy(self)  # shallow: both have the same tensors, those that are allocated later too
        selected.rows, selected.lengths, selected.parent = rows, self.lengths[rows], self
        selected.written, selected.counts = {}, None
        return selected

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        if self.parent is not None:
            lengths_of_all = self.parent.lengths.clone()
            lengths_of_all[self.rows] = lengths
            self.parent.lengths = lengths_of_all

    def _of_rows(self, name: str) -> Tensor:
        return self.tensors[name] if self.parent is None else self.tensors[name][self.rows]

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise ValueError(f"the cache has no '{name}': cache_tensors declares {', '.join(self.specs)}")
        return self.specs[name]

    def _declared(self, name: str, x: Tensor, tokens: int) -> TensorSpec:
        spec = self._spec(name)
        expected = spec.sized({"rows": len(self.lengths), "capacity": tokens})
        if tuple(x.shape) != expected:
            raise ValueError(
                f"the cache's '{name}': found {tuple(x.shape)}; expected {expected}, as declared"
            )
        return spec


def state_tensors(backbone: Backbone) -> list[TensorSpec]:
    """Return the tensors of a backbone's cache that have no entry for each position."""
    tensors = backbone.cache_tensors if isinstance(backbone, DeclaresCache) else ()
    return [spec for spec in tensors if "capacity" not in spec.shape]


def same_block(together: Tensor) -> Tensor:
    """Return a mask (B, T, T): True where two positions are of the same block of ``together`` (B, T)."""
    return (together[:, :, None] == together[:, None]) & (together > 0)[:, :, None]
