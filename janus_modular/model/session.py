"""A session of a model in torch: rows of any length are admitted, extended and freed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from janus_modular.capabilities import CopiesRows, DrawsOtherSizes, HidesPositions
from janus_modular.errors import PromptError
from janus_modular.finite import refuse_not_finite
from janus_modular.graph_specs import GraphSignature, sample_text_tensors
from janus_modular.image_sizes import ImageSize, size_text
from janus_modular.interfaces import RowCache, StateCache
from janus_modular.model.batch import collate
from janus_modular.model.cache import state_tensors
from janus_modular.model.model import JanusModel, position_axes
from janus_modular.positions import RowPositions
from janus_modular.sequence import Sequence
from janus_modular.session_errors import check_max_seq_len, unknown_graph
from janus_modular.sessions import BaseSession

FINGERPRINTED = 64
"""Values of each weight that a fingerprint reads: all of them would take seconds."""


class TorchRuntime:
    """Opens sessions of a model in torch; a `janus_modular.Runtime`."""

    def __init__(self, model: JanusModel, *, pad: int, suppressed_ids: Many[int] = ()) -> None:
        """Take a model, the pad id, and the ids that are never sampled for text."""
        self.model = model
        self.context = model.backbone.context
        self.text_sampler = model.text_sampler
        self.image_sampler = model.image_sampler
        self.pad = pad
        self.suppressed_ids = suppressed_ids
        self.sized_functions: dict[str, Callable[..., Any]] = {}  # of graphs of other sizes, by their names

    def image_size(self, height: int, width: int) -> ImageSize:
        """Return a size for sessions.

        Raises:
            PromptError: the generation path does not draw it; says why.
        """
        path = self.model.generation
        try:
            if not isinstance(path, DrawsOtherSizes):
                raise ValueError(f"the generation path {type(path).__name__} has no other size")
            sized = path.sized(height, width)
        except ValueError as error:
            raise PromptError(
                f"size: found {size_text(height, width)}; the model draws"
                f" {size_text(path.height, path.width)} and not this: {error}."
            ) from error
        own = {graph.name: (graph.inputs, graph.outputs) for graph in path.graphs()}
        changed = [graph for graph in sized.graphs() if (graph.inputs, graph.outputs) != own.get(graph.name)]
        names = {graph.name: f"{graph.name}@{size_text(height, width)}" for graph in changed}
        self.sized_functions |= {names[graph.name]: graph.function for graph in changed}
        return ImageSize(height, width, sized.num_tokens, sized.sizes, names)

    def fingerprint(self) -> str:
        """Return a digest of some values of every weight, which change when it is trained."""
        digest = sha256()
        for name, weight in self.model.state_dict().items():
            flat = weight.reshape(-1)
            some = flat[:: max(1, len(flat) // FINGERPRINTED)][:FINGERPRINTED]
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
            digest.update(some.double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def open(self, max_seq_len: int, rows: int | None = None) -> TorchSession:
        """Open a session whose rows hold up to ``max_seq_len`` positions.

        Raises:
            PromptError: the context has fewer.
        """
        return TorchSession(
            self.model,
            max_seq_len=check_max_seq_len(max_seq_len, self.context),
            rows=rows,
            pad=self.pad,
            suppressed_ids=self.suppressed_ids,
            sized_functions=self.sized_functions,
        )


class TorchSession(BaseSession):
    """A `janus_modular.Session` over a model in torch. Open a new one per run: it contains the cache."""

    def __init__(
        self,
        model: JanusModel,
        *,
        max_seq_len: int,
        pad: int,
        rows: int | None = None,
        suppressed_ids: Many[int] = (),
        sized_functions: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        """Prepare rows of up to ``max_seq_len`` positions; no memory is allocated yet."""
        super().__init__(max_seq_len, rows)
        weight = next(model.backbone.parameters())  # type: ignore[attr-defined]  # components are modules
        self.model = model
        self.device, self.dtype = weight.device, weight.dtype
        self.hidden_size = model.backbone.hidden_size
        self.cache: RowCache = model.backbone.new_cache(0, max_seq_len)
        self.together = bool(model.config.together)
        self.position_axes = position_axes(model.backbone)
        self.has_states = bool(state_tensors(model.backbone))
        self.suppressed_ids = torch.tensor(list(suppressed_ids), dtype=torch.int64, device=self.device)
        self.vocab_size = model.backbone.vocab_size
        graphs = model.generation.graphs()
        self.signatures = {
            "sample_text": GraphSignature(*sample_text_tensors(self.vocab_size, self.hidden_size)),
            **{graph.name: GraphSignature(graph.inputs, graph.outputs, graph.role) for graph in graphs},
        }
        self.functions: Mapping[str, Callable[..., Any]] = {
            "embed": model.backbone.embed,
            "sample_text": self.sample_text,
            **{graph.name: graph.function for graph in graphs},
        }
        self.sized_functions = {} if sized_functions is None else sized_functions  # sizes are added later
        self.pad_id = pad
        self.image_positions = model.generation.num_tokens
        self.sizes: Mapping[str, Any] = model.generation.sizes

    def allocate_rows(self, count: int) -> None:
        """Make ``count`` empty rows."""
        self.cache = self.model.backbone.new_cache(count, self.max_seq_len)
        self.hides_positions = isinstance(self.cache, HidesPositions)  # too slow a check for every step

    @torch.no_grad()
    def read_prompts(self, prompts: Many[Sequence], first_row: int) -> Tensor:
        """Read prompts into the rows from ``first_row`` on; return the last hidden states (n, D)."""
        count = len(prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        batch = collate(prompts).to(self.device)
        x = self.model.embed(batch)  # (n, T, D)
        cache = self.cache
        if count < len(self.lengths):
            cache = cache.select(slice(first_row, first_row + count))
        cache.truncate(torch.zeros_like(lengths))
        index = np.tile(np.arange(x.shape[1]), (count, 1))  # (n, T), in padding too
        rows = RowPositions.of_prompts(self.position_axes, prompts)
        self._hide(cache, rows.hidden_in())
        hidden = self._forward(x, rows.of(index), cache, lengths, batch.together)  # (n, T, D)
        return hidden[torch.arange(count), lengths - 1]

    def feed(self, x: Tensor | NDArray[Any], counts: NDArray[np.int64]) -> Tensor:
        """Feed x (rows, W, D); return the hidden states (rows, W, D)."""
        self._hide(self.cache, self.row_positions.hidden_in())
        return self._feed(x, counts, self.lengths, self.cache)

    def feed_rows(self, x: Tensor | NDArray[Any], counts: NDArray[np.int64], first_row: int) -> Tensor:
        """Feed x (n, W, D) to the rows from ``first_row`` on; return their hidden states (n, W, D)."""
        rows = slice(first_row, first_row + len(x))
        cache = self.cache.select(rows)
        self._hide(cache, self.row_positions.hidden_in(first_row, len(x)))
        return self._feed(x, counts, self.lengths[rows], cache)

    @torch.no_grad()
    def _feed(
        self, x: Tensor | NDArray[Any], counts: NDArray[np.int64], lengths: NDArray[np.int64], cache: RowCache
    ) -> Tensor:
        index = lengths[:, None] + np.arange(x.shape[1])  # (n, W)
        positions = self.row_positions.of(index, last=self.max_seq_len - 1)
        return self._forward(self._embeddings(x), positions, cache, torch.from_numpy(counts))

    def _hide(self, cache: RowCache, hidden: NDArray[np.bool_] | None) -> None:
        """Set the hidden positions (n, T) of a cache, which no other position attends to, for the next pass.

        Raises:
            PromptError: the backbone's cache cannot hide positions.
        """
        if self.hides_positions:
            mask = None if hidden is None else torch.from_numpy(hidden).to(self.device)
            cast(HidesPositions, cache).hidden = mask
        elif hidden is not None:
            raise PromptError(
                f"prompts: found positions that no other attends to; the cache {type(cache).__name__} of the"
                " backbone cannot hide them (`janus_modular.HidesPositions`): choose another backbone, or a"
                " generation path that attends to a dropped condition."
            )

    def _forward(
        self,
        x: Tensor,
        positions: NDArray[np.int64],
        cache: RowCache,
        counts: Tensor,
        together: Tensor | None = None,
    ) -> Tensor:
        """Feed x (n, T, D) into a cache of n rows, which keep ``counts`` (n,) positions of it."""
        if self.has_states:
            cast(StateCache, cache).keep(counts)
        on_device = torch.from_numpy(positions).to(self.device)
        blocks = {} if together is None else {"together": together}
        hidden = self.model.backbone(x, positions=on_device, cache=cache, **blocks)
        cache.advance(counts)
        return hidden

    @torch.no_grad()
    def prompt_embeddings(self, prompts: Many[Sequence]) -> Tensor:
        """Return the embeddings (n, T, D) of prompts."""
        return self.model.embed(collate(prompts).to(self.device))

    def copy_positions(self, source: int, target: int, length: int) -> bool:
        """Copy what a row's cache holds of its first positions; False: the backbone's cache cannot."""
        if self.has_states or not isinstance(self.cache, CopiesRows):
            return False
        self.cache.copy_row(source, target, length)
        return True

    def cut_rows(self) -> None:
        """Cut the cache back to `lengths`."""
        self.cache.truncate(torch.tensor(self.lengths))

    def expand(self, x: Tensor | NDArray[Any]) -> Tensor | NDArray[Any]:
        """Return (n, D) as (n, 1, D)."""
        return x[:, None]

    def squeeze(self, x: Tensor) -> Tensor:
        """Return (n, 1, D) as (n, D)."""
        return x[:, 0]

    def take(self, tensors: Any, indices: Any) -> Tensor:
        """Copy vectors of one or several tensors (..., D) into a new one (*indices.shape, D)."""
        several = tensors if isinstance(tensors, list | tuple) else [tensors]
        flat = [self._embeddings(x).reshape(-1, x.shape[-1]) for x in several]
        vectors = flat[0] if len(flat) == 1 else torch.cat(flat)
        return vectors[torch.tensor(np.asarray(indices, np.int64), device=self.device)]

    @torch.no_grad()
    def run(self, name: str, *inputs: Any) -> Any:
        """Run a function of the model by name; numpy inputs are copied to its device."""
        name = self.graph_names.get(name, name)
        function = self.functions.get(name) or self.sized_functions.get(name)
        if function is None:
            raise unknown_graph(name, self.functions)
        return function(*(self._on_device(x) for x in inputs))

    def sample_text(
        self, hidden: Tensor, noise: Tensor, temperature: Tensor, top_k: int, top_p: float
    ) -> tuple[Tensor, Tensor]:
        """Choose the next token of each row (R, D); return ids (R,) and their embeddings (R, D)."""
        return self.model.sample_text(hidden, noise, temperature, top_k, top_p, self.suppressed_ids)

    def stack(self, columns: Many[Tensor]) -> Tensor:
        """Join tensors (rows, ...) of successive steps as (rows, steps, ...).

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite.
        """
        joined = torch.stack(list(columns), dim=1)
        if not joined.is_floating_point():
            self.to_host(joined)
        return joined

    def to_host(self, x: Tensor) -> NDArray[Any]:
        """Copy a tensor to numpy; bfloat16, which numpy lacks, becomes float32.

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite.
        """
        return refuse_not_finite((x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy())

    def _on_device(self, x: Any) -> Any:
        if isinstance(x, np.ndarray | np.generic):
            return torch.from_numpy(np.asarray(x)).to(self.device)
        return x

    def _embeddings(self, x: Tensor | NDArray[Any]) -> Tensor:
        """Return embeddings that may be numpy's as a tensor of the model's dtype."""
        return torch.from_numpy(x).to(self.device, self.dtype) if isinstance(x, np.ndarray) else x
