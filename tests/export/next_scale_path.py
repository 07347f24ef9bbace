"""A plugin that draws an image scale by scale, all codes of a scale in one pass of the backbone.

A scale is predicted from the image that the coarser scales make, enlarged to its grid ("Visual autoregressive
modeling: scalable image generation via next-scale prediction", section 3.2). Codes are colours of a learned
table, of what the coarser scales left over.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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

SCALES = (1, 2, 4)  # sides of the grids of codes
COUNTS = [side**2 for side in SCALES]
STARTS = [sum(COUNTS[:scale]) for scale in range(len(SCALES))]
PATCH, COLOURS = 8, 24


@dataclass
class NextScaleConfig(ComponentConfig):
    """No options."""


class NextScale(nn.Module):
    """Codes (N, 21) of the scales of an image, coarse to fine."""

    predicts_next = False
    image_sampler = "next-scale"
    frozen_submodules: tuple[str, ...] = ()
    height = width = SCALES[-1] * PATCH
    num_tokens = sum(COUNTS)

    def __init__(self, config: NextScaleConfig, hidden_size: int) -> None:
        super().__init__()
        self.config, self.hidden_size = config, hidden_size
        self.sizes: Mapping[str, Any] = {"counts": COUNTS, "colours": COLOURS}
        self.register_buffer("table", torch.randn(COLOURS, 3, generator=torch.Generator().manual_seed(0)) / 2)
        self.inputs = nn.Linear(3, hidden_size)
        self.places = nn.Parameter(0.1 * torch.randn(self.num_tokens, hidden_size))
        self.head = nn.Linear(hidden_size, COLOURS)

    @torch.no_grad()
    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator] = ()) -> Tensor:
        """Return the codes (N, 21) of images, each of what the coarser scales left over."""
        rest = F.avg_pool2d(pixels.float(), PATCH) / 127.5 - 1  # (N, 3, 4, 4)
        codes = []
        for side in SCALES:
            colours = F.adaptive_avg_pool2d(rest, side).flatten(2).transpose(1, 2)  # (N, side^2, 3)
            nearest = torch.cdist(colours, self.table.float()).argmin(-1)
            codes.append(nearest)
            rest = rest - self._painted(nearest, side)
        return torch.cat(codes, 1)

    def embed(self, targets: Tensor) -> Tensor:
        """Return the inputs (N, 21, D) of all scales, each of the codes before it."""
        return torch.cat([self.scale_inputs(scale, targets) for scale in range(len(SCALES))], 1)

    def losses(self, hidden: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
        """Return the cross entropy (N, 21) of codes."""
        logits = self.head(hidden).float()
        return {"image": F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")}

    def scale_inputs(self, scale: int, codes: Tensor) -> Tensor:
        """Return the inputs (N, side^2, D) of a scale, of the codes before it; later ones are not read."""
        side, start = SCALES[scale], STARTS[scale]
        image = F.adaptive_avg_pool2d(self._image(codes, scale), side).flatten(2).transpose(1, 2)
        x = self.inputs(image.to(self.inputs.weight.dtype)) + self.places[start : start + side**2]
        return x + 0 * codes[:, :1, None].to(x.dtype)  # the first scale has no codes to read but their number

    def sample_codes(self, hidden: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
        """Choose the codes (N, W) of a scale, for states (2N, W, D) and noise (N, W, K) of Exp(1)."""
        text, none = self.head(hidden).float().unflatten(0, (2, -1))  # (N, W, K) each
        return ((none + guidance * (text - none)).softmax(-1) / noise).argmax(-1)

    def decode_image(self, codes: Tensor) -> Tensor:
        """Paint codes (N, 21) as images (N, 3, H, W), uint8."""
        colours = (self._image(codes, len(SCALES)).clamp(-1, 1) + 1) * 127.5
        return colours.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3).to(torch.uint8)

    def graphs(self) -> list[GraphSpec]:
        """Declare the inputs of each scale, the choice of codes, and the decoder."""
        codes = TensorSpec("codes", "int64", ("rows", self.num_tokens))
        scales = [
            GraphSpec(
                f"scale_{scale}",
                partial(self.scale_inputs, scale),
                inputs=(codes,),
                outputs=(TensorSpec("embeddings", "model", ("rows", count, self.hidden_size)),),
            )
            for scale, count in enumerate(COUNTS)
        ]
        return [
            *scales,
            GraphSpec(
                "sample_codes",
                self.sample_codes,
                inputs=(
                    TensorSpec("hidden", "model", ("2*images", "tokens", self.hidden_size)),
                    TensorSpec("noise", "float32", ("images", "tokens", COLOURS)),
                    TensorSpec("guidance", "float32", ()),
                ),
                outputs=(TensorSpec("codes", "int64", ("images", "tokens")),),
                role="sample",
            ),
            GraphSpec(
                "decode_image",
                self.decode_image,
                inputs=(TensorSpec("codes", "int64", ("images", self.num_tokens)),),
                outputs=(TensorSpec("pixels", "uint8", ("images", 3, self.height, self.width)),),
                role="decode",
            ),
        ]

    def _image(self, codes: Tensor, scales: int) -> Tensor:
        """Return the image (N, 3, 4, 4) of the first scales' codes."""
        image = self.table.new_zeros(codes.shape[0], 3, SCALES[-1], SCALES[-1])
        for start, side in list(zip(STARTS, SCALES, strict=True))[:scales]:
            image = image + self._painted(codes[:, start : start + side**2], side)
        return image

    def _painted(self, codes: Tensor, side: int) -> Tensor:
        """Return the colours (N, 3, 4, 4) of codes (N, side^2)."""
        colours = self.table[codes].transpose(1, 2).unflatten(2, (side, side))
        times = SCALES[-1] // side
        return colours.repeat_interleave(times, 2).repeat_interleave(times, 3)


@dataclass
class NextScaleSettings(ImageSamplerSettings):
    """How codes are chosen."""

    guidance: float = 2.0
    temperature: float = 1.0
    seed: int = 0


def draw(
    session: Session, prompts: Sequence[Prompt], settings: NextScaleSettings
) -> Generator[tuple[int, int], None, NDArray[np.uint8]]:
    """Draw a scale in each pass: its inputs, one call of the backbone, and all of its codes."""
    counts, colours = session.sizes["counts"], session.sizes["colours"]
    numbers = settings.numbers or range(settings.first, settings.first + len(prompts))
    rngs = [np.random.default_rng((settings.seed, number)) for number in numbers]
    codes = np.zeros((len(prompts), sum(counts)), np.int64)
    session.prefill([*prompts, *(unconditional(prompt, session.pad_id) for prompt in prompts)])
    done = 0
    for scale, count in enumerate(counts):
        hidden = session.extend(session.run(f"scale_{scale}", np.concatenate([codes, codes])))
        noise = np.stack([rng.standard_exponential((count, colours), np.float32) for rng in rngs])
        noise = noise ** np.float32(settings.temperature)  # the logits divided by it, to a positive factor
        chosen = session.run("sample_codes", hidden, noise, np.float32(settings.guidance))
        codes[:, done : done + count] = session.to_host(chosen)
        done += count
        yield done, sum(counts)
    return session.to_host(session.run("decode_image", codes))


@hookimpl
def register_generation(registry: Registry[GenerationPath]) -> None:
    """Register the path."""
    registry.add("next-scale", NextScale, NextScaleConfig)


@hookimpl
def register_image_samplers(registry: Registry[ImageSampler[Any]]) -> None:
    """Register the sampler."""
    registry.add("next-scale", draw, NextScaleSettings)
