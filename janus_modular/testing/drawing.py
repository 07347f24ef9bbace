"""Draws with a generation path alone: its image sampler runs on a stand-in for the backbone."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from janus_modular import samplers
from janus_modular.errors import JanusError
from janus_modular.plugins import default_plugins
from janus_modular.sequence import Sequence
from janus_modular.testing.check import ensure
from janus_modular.testing.examples import RecurrentSession, prompt

VOCAB_SIZE = 8


class Sizes(dict[str, Any]):
    """The sizes of a session; reading a size that is missing fails the check."""

    def __missing__(self, name: str) -> Any:
        ensure(False, f"its image sampler reads the size '{name}', which `sizes` lacks: {dict(self)}")
        raise AssertionError


class PathSession(RecurrentSession):
    """A `janus_modular.Session` of a path in torch; hidden states follow a recurrence of D numbers a row."""

    def __init__(self, path: Any, hidden_size: int) -> None:
        tokens, steps = np.arange(1, 65, dtype=np.float32), np.arange(1, hidden_size + 1, dtype=np.float32)
        super().__init__(np.sin(tokens[:, None] * steps))
        self.path = path
        self.vocab_size, self.pad_id, self.image_positions = VOCAB_SIZE, 0, path.num_tokens
        self.sizes = Sizes(path.sizes)
        self.inputs: dict[str, tuple[Any, ...]] = {}  # of the first call of each part, by name

    def read_prompts(self, prompts: Many[Sequence], first_row: int) -> Tensor:
        """Read prompts into the rows from ``first_row`` on; return the last hidden states (n, D)."""
        return torch.from_numpy(super().read_prompts(prompts, first_row))

    def feed(self, x: Any, counts: NDArray[np.int64]) -> Tensor:
        """Feed x (rows, W, D); return the hidden states (rows, W, D)."""
        return torch.from_numpy(super().feed(torch.as_tensor(x).float().numpy(), counts))

    def take(self, tensors: Any, indices: Any) -> Tensor:
        """Copy vectors of one or several tensors (..., D) into a new one (*indices.shape, D)."""
        return torch.from_numpy(super().take(tensors, indices))

    def run(self, name: str, *inputs: Any) -> Any:
        """Run one of the path's parts."""
        parts = self.path.parts()
        ensure(
            name in parts,
            f"its image sampler runs the part '{name}'; the path has {', '.join(parts) or 'none'}",
        )
        arguments = tuple(torch.as_tensor(x) if isinstance(x, np.ndarray | np.generic) else x for x in inputs)
        self.inputs.setdefault(name, arguments)
        return parts[name](*arguments)

    def stack(self, columns: Many[Tensor]) -> Tensor:
        """Join tensors (rows, ...) of successive steps as (rows, steps, ...)."""
        return torch.stack(list(columns), dim=1)

    def to_host(self, x: Tensor) -> NDArray[Any]:
        """Bring a tensor to numpy."""
        return x.numpy()


@torch.no_grad()
def draw_with(path: Any, images: int, hidden_size: int) -> tuple[PathSession, NDArray[Any]]:
    """Draw images with a path's image sampler; return the session and the pixels.

    Raises:
        PluginError: the path's image sampler is not registered.
        CheckError: the sampler breaks its protocol, or uses a part or a size that the path lacks.
    """
    entry = default_plugins().entry("image_samplers", path.image_sampler)
    session = PathSession(path, hidden_size)
    steps = entry.factory(session, [prompt(1, 2, 3 + image) for image in range(images)], entry.config())
    return session, samplers.draw_images(path.image_sampler, steps, images, lambda done, total: None)


def parts_run(path: Any, images: int, hidden_size: int) -> dict[str, tuple[Any, ...]]:
    """Return the parts that the path's image sampler runs, with their inputs; {} if drawing fails.

    Another check reports whether drawing works; the checks that use these inputs still run.
    """
    try:
        return draw_with(path, images, hidden_size)[0].inputs
    except JanusError:
        return {}
