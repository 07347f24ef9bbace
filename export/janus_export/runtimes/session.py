"""The base class of sessions that run a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from janus_export.bundle.contract import MAGNITUDE
from janus_export.runtimes.kv_cache import axes_of_positions
from janus_export.runtimes.prompts import Run, embed
from janus_modular import BaseSession, GraphSignature, TensorSpec
from janus_modular import Sequence as Prompt


class BundleSession(BaseSession):
    """A session whose sizes are those in a bundle's manifest; a runtime implements the computation."""

    runtime: Any  # the runtime that opened it, with `config.images`: input images that are encoded at once

    def __init__(self, runtime: Any, max_seq_len: int, rows: int | None) -> None:
        """Open a session of a runtime with ``bundle`` and ``hidden_size``; no memory is allocated yet."""
        super().__init__(max_seq_len, rows)
        model: Mapping[str, Any] = runtime.bundle.manifest["model"]
        self.hidden_size = runtime.hidden_size
        self.vocab_size = model["vocab_size"]
        self.pad_id = model["pad_id"]
        self.image_positions = model["image_target"]["positions"]
        self.sizes = model["sizes"]
        backbone = runtime.bundle.graphs["backbone"]
        self.has_states = bool(backbone.get("states"))
        self.together = bool(model.get("together"))
        self.position_axes = axes_of_positions(backbone["inputs"])
        self.signatures = {name: signature(record) for name, record in runtime.bundle.graphs.items()}

    def _embed(self, prompts: Sequence[Prompt], run: Run) -> NDArray[Any]:
        """Return the embeddings (n, T, D) of prompts, from graphs that ``run`` runs on numpy arrays."""
        return embed(prompts, run, images_at_once=self.runtime.config.images, graphs=self.signatures)


def signature(record: Mapping[str, Any]) -> GraphSignature:
    """Return the tensors of a graph from its entry in the manifest, without those that export adds."""

    def tensors(side: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(tensor["name"], tensor["dtype"], tuple(tensor["shape"]))
            for tensor in record[side]
            if tensor["name"] != MAGNITUDE
        )

    return GraphSignature(tensors("inputs"), tensors("outputs"), record.get("role", "other"))
