"""Drawing with a generation path alone: its image sampler, over a stand-in for the backbone."""

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
from janus_modular.testing.examples import prompt

VOCABULARY = 8


class Sizes(dict[str, Any]):
    """Sizes of a session; a size that the sampler reads and that is missing fails the check."""

    def __missing__(self, name: str) -> Any:
        ensure(False, f"its image sampler reads the size '{name}', which `sizes` lacks: {dict(self)}")
        raise AssertionError


class PathSession:
    """A `janus_modular.Session` of a path; hidden states follow a fixed recurrence of D numbers a row."""

    def __init__(self, path: Any, hidden_size: int) -> None:
        self.path, self.hidden_size = path, hidden_size
        self.vocab_size, self.pad_id, self.image_positions = VOCABULARY, 0, path.num_tokens
        self.sizes = Sizes(path.sizes)
        self.hidden = torch.zeros(0, hidden_size)
        self.ran: dict[str, tuple[Any, ...]] = {}  # parts by name, with the inputs of their first call

    def prefill(self, prompts: Many[Sequence]) -> Tensor:
        """Read one prompt a row."""
        steps = torch.arange(1, self.hidden_size + 1, dtype=torch.float32)
        self.hidden = torch.stack([torch.sin(steps * float(1 + one.tokens.sum())) for one in prompts])
        return self.hidden

    def step(self, x: Any, active: NDArray[np.bool_] | None = None) -> Tensor:
        """Feed one embedding a row."""
        moved = torch.tanh(0.5 * self.hidden + x)
        self.hidden = (
            moved if active is None else torch.where(torch.tensor(active)[:, None], moved, self.hidden)
        )
        return self.hidden

    def run(self, part: str, *inputs: Any) -> Any:
        """Run one of the path's parts."""
        parts = self.path.parts()
        ensure(
            part in parts,
            f"its image sampler runs the part '{part}'; the path offers {', '.join(parts) or 'none'}",
        )
        taken = tuple(torch.as_tensor(x) if isinstance(x, np.ndarray | np.generic) else x for x in inputs)
        self.ran.setdefault(part, taken)
        return parts[part](*taken)

    def stack(self, columns: Many[Tensor]) -> Tensor:
        """Join tensors (rows, ...) of successive steps as (rows, steps, ...)."""
        return torch.stack(list(columns), dim=1)

    def to_host(self, x: Tensor) -> NDArray[Any]:
        """Bring a tensor to numpy."""
        return x.numpy()


@torch.no_grad()
def draw_with(path: Any, images: int, hidden_size: int) -> tuple[PathSession, NDArray[Any]]:
    """Draw some images with a path's image sampler; return the session and the pixels.

    Raises:
        PluginError: no image sampler is registered under the name that the path gives.
        CheckError: the sampler breaks its protocol, or uses a part or a size that the path lacks.
    """
    entry = default_plugins().entry("image_samplers", path.image_sampler)
    session = PathSession(path, hidden_size)
    steps = entry.factory(session, [prompt(1, 2, 3 + image) for image in range(images)], entry.config())
    return session, samplers.draw_images(path.image_sampler, steps, images, lambda done, total: None)


def parts_run(path: Any, images: int, hidden_size: int) -> dict[str, tuple[Any, ...]]:
    """Return the parts that the path's image sampler runs, with their inputs; {} if drawing fails.

    Whether drawing works is a check of its own, so that the other checks still report what they find.
    """
    try:
        return draw_with(path, images, hidden_size)[0].ran
    except JanusError:
        return {}
