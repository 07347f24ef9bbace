"""A plugin whose images are latents, refined over several steps with three rows of the backbone an image.

Nothing of it is called as in Janus' own path: neither its graphs nor its sizes, and it has no codes.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    ComponentConfig,
    GenerationPath,
    GraphSpec,
    ImageSampler,
    ImageSamplerSettings,
    Registry,
    Session,
    TensorSpec,
    hookimpl,
    unconditional,
)
from janus_modular import Sequence as Prompt

SIDE, PATCH = 4, 8
LATENT_DIM = 3 * SIDE**2
TIMES = [0.0, 0.25, 0.5, 0.75]


@dataclass
class FlowConfig(ComponentConfig):
    """No options."""


class Flow(nn.Module):
    """Latents (N, 48) of an image: its colours, averaged over patches, from -1 to 1."""

    predicts_next = False
    image_sampler = "flow"
    frozen_submodules: tuple[str, ...] = ()
    height = width = SIDE * PATCH
    num_tokens = len(TIMES)

    def __init__(self, config: FlowConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.sizes: Mapping[str, Any] = {"times": TIMES, "latent_dim": LATENT_DIM, "solver": "euler"}
        self.embedding = nn.Linear(LATENT_DIM + 1, hidden_size)
        self.head = nn.Linear(hidden_size, LATENT_DIM)

    @torch.no_grad()
    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator] = ()) -> dict[str, Tensor]:
        """Return latents (N, 48) of images, and noise (N, 48) to begin from."""
        noise = np.stack([rng.standard_normal(LATENT_DIM, np.float32) for rng in rngs])
        latents = F.avg_pool2d(pixels.float(), PATCH).flatten(1) / 127.5 - 1
        return {"latents": latents, "noise": torch.from_numpy(noise).to(latents.device)}

    def embed(self, targets: dict[str, Tensor]) -> Tensor:
        """Embed the way from noise to latents at every time, (N, steps, D)."""
        noise, latents = targets["noise"], targets["latents"]
        states = [self._state((1 - t) * noise + t * latents, torch.tensor(t)) for t in TIMES]
        return torch.stack(states, dim=1)

    def losses(self, hidden: Tensor, targets: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the squared error (N, steps) of the velocity."""
        velocity = (targets["latents"] - targets["noise"])[:, None]
        return {"image": (self.head(hidden).float() - velocity).square().mean(-1)}

    def velocity(self, hidden: Tensor, latents: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Move latents (N, 48) by one step, guided by three rows; return them and the next inputs (3N, D)."""
        text, none, negative = self.head(hidden).float().unflatten(0, (3, -1))  # (N, 48) each
        moved = latents + (text + 1.5 * (text - none) - 0.5 * (negative - none)) / len(TIMES)
        return moved, self._state(moved, time).repeat(3, 1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Paint latents (N, 48) as images (N, 3, H, W), uint8."""
        colours = (latents.clamp(-1, 1) + 1) * 127.5
        grid = colours.unflatten(1, (3, SIDE, SIDE))
        return grid.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).to(torch.uint8)

    def graphs(self) -> list[GraphSpec]:
        """Declare the step and the decoder."""
        hidden_size = self.head.in_features
        latents = TensorSpec("latents", "float32", ("images", LATENT_DIM))
        rows = ("3*images", hidden_size)
        return [
            GraphSpec(
                "velocity",
                self.velocity,
                inputs=(TensorSpec("hidden", "model", rows), latents, TensorSpec("time", "float32", ())),
                outputs=(TensorSpec("moved", "float32", latents.shape), TensorSpec("x", "model", rows)),
            ),
            GraphSpec(
                "decode_latents",
                self.decode_latents,
                inputs=(latents,),
                outputs=(TensorSpec("pixels", "uint8", ("images", 3, self.height, self.width)),),
                role="decode",
            ),
        ]

    def _state(self, latents: Tensor, time: Tensor) -> Tensor:
        """Embed latents (N, 48) at a time as (N, D)."""
        state = torch.cat([latents, time.to(latents).expand(latents.shape[0], 1)], dim=-1)
        return self.embedding(state.to(self.embedding.weight.dtype))


@dataclass
class FlowSettings(ImageSamplerSettings):
    """How latents are refined."""

    seed: int = 0


def flow(
    session: Session, prompts: Sequence[Prompt], settings: FlowSettings
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """Refine noise over the times that the path says."""
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    latents: Any = np.stack([rng.standard_normal(session.sizes["latent_dim"], np.float32) for rng in rngs])
    dropped = [unconditional(prompt, session.pad_id) for prompt in prompts]
    negative = [unconditional(prompt, session.pad_id + 1) for prompt in prompts]
    hidden = session.prefill([*prompts, *dropped, *negative])
    times = session.sizes["times"]
    for step, time in enumerate(times, 1):
        latents, x = session.run("velocity", hidden, latents, np.float32(time))
        yield step, len(times)
        if step < len(times):
            hidden = session.step(x)
    return session.to_host(session.run("decode_latents", latents))


@hookimpl
def register_generation(registry: Registry[GenerationPath]) -> None:
    """Register the path."""
    registry.add("flow", Flow, FlowConfig)


@hookimpl
def register_image_samplers(registry: Registry[ImageSampler[Any]]) -> None:
    """Register the sampler."""
    registry.add("flow", flow, FlowSettings)
