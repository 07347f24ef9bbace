"""A running model in torch: rows of any length that go on step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from janus_modular.finite import refuse_not_finite
from janus_modular.interfaces import Cache
from janus_modular.model.batch import collate
from janus_modular.model.model import JanusModel
from janus_modular.sequence import Sequence


class TorchRuntime:
    """Opens sessions of a model in torch; a `janus_modular.Runtime`."""

    def __init__(self, model: JanusModel, *, pad: int, suppressed_ids: Many[int] = ()) -> None:
        """Take a model, the pad id, and the ids that an answer in words never holds."""
        self.model = model
        self.context = model.backbone.context
        self.text_sampler = model.text_sampler
        self.image_sampler = model.image_sampler
        self.pad = pad
        self.suppressed_ids = suppressed_ids

    def open(self, capacity: int) -> TorchSession:
        """Open a session whose rows have room for ``capacity`` positions."""
        return TorchSession(self.model, capacity=capacity, pad=self.pad, suppressed_ids=self.suppressed_ids)


class TorchSession:
    """A `janus_modular.Session` over a model in torch. Open one for every run: it holds the cache."""

    def __init__(self, model: JanusModel, *, capacity: int, pad: int, suppressed_ids: Many[int] = ()) -> None:
        """Make rows with room for ``capacity`` positions; how many there are, the prompts say."""
        self.model = model
        self.device = next(model.parameters()).device
        self.capacity = capacity
        self.cache: Cache = model.backbone.new_cache(0, capacity)
        self.suppressed_ids = torch.tensor(list(suppressed_ids), dtype=torch.int64, device=self.device)
        self.parts: Mapping[str, Callable[..., Any]] = {
            "sample_text": self.sample_text,
            **model.generation.parts(),
        }
        self.vocab_size = model.backbone.vocab_size
        self.pad_id = pad
        self.image_positions = model.generation.num_tokens
        self.sizes: Mapping[str, Any] = model.generation.sizes

    @torch.no_grad()
    def prefill(self, prompts: Many[Sequence]) -> Tensor:
        """Read one prompt a row; return the last hidden state of each (rows, D)."""
        batch = collate(prompts).to(self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.cache = self.model.backbone.new_cache(len(prompts), self.capacity)
        x = self.model.embed(batch)  # (R, T, D)
        hidden = self.model.backbone(x, positions=batch.positions, cache=self.cache)  # (R, T, D)
        self.cache.advance(lengths)
        return hidden[torch.arange(len(prompts)), lengths - 1]

    @torch.no_grad()
    def step(self, x: Tensor, active: NDArray[np.bool_] | None = None) -> Tensor:
        """Feed one embedding a row (rows, D); rows that are not active stay where they are."""
        positions = self.cache.lengths.to(self.device)[:, None]  # (R, 1)
        hidden = self.model.backbone(x.unsqueeze(1), positions=positions, cache=self.cache)  # (R, 1, D)
        counts = torch.ones(len(x)) if active is None else torch.from_numpy(active)
        self.cache.advance(counts.to(torch.int64))
        return hidden.squeeze(1)

    @torch.no_grad()
    def run(self, part: str, *inputs: Any) -> Any:
        """Run a part of the model by name."""
        return self.parts[part](*(self._taken_over(x) for x in inputs))

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
        """Bring a tensor to numpy; bfloat16, which numpy lacks, as the same numbers in float32.

        Raises:
            NotFiniteError: ids were sampled from logits that are NaN or infinite.
        """
        return refuse_not_finite((x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy())

    def _taken_over(self, x: Any) -> Any:
        return (
            torch.from_numpy(np.asarray(x)).to(self.device) if isinstance(x, np.ndarray | np.generic) else x
        )
