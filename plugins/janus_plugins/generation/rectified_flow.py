"""The generation path `rectified-flow`, JanusFlow's: noise becomes an image along nearly straight lines.

An autoencoder encodes an image as latents x, which are mixed with noise z: x_t = t x + (1 - t) z. A shallow
U-ViT embeds the mixture as positions, which the backbone reads behind the prompt; from the hidden states, the
U-ViT predicts the velocity x - z. Sampling integrates the velocity from noise (t = 0) to the image (t = 1).
The first position of an image holds the embedding of the time t (JanusFlow: Ma et al. 2024, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import (
    Adaptor,
    ComponentConfig,
    ComponentSpec,
    GenerationPath,
    GraphSpec,
    ImageAutoencoder,
    NotFiniteError,
    Registry,
    TensorSpec,
    component,
    hookimpl,
)
from janus_plugins.generation.u_vit import EPS, UViTDecoder, UViTEncoder
from janus_plugins.sizes import check_sizes


@dataclass
class RectifiedFlowConfig(ComponentConfig):
    """The autoencoder, the adaptor, the U-ViT, and the image size; the defaults are JanusFlow's."""

    autoencoder: ComponentSpec = component("image_autoencoders")  # images to latents, and back
    adaptor: ComponentSpec = component("adaptors")  # the U-ViT's features to the backbone
    height: int = 384  # pixels
    width: int = 384  # pixels
    channels: int = 768  # C, of the U-ViT's features
    patch_size: int = 2  # side of the square of latents that a position holds
    encoder_blocks: int = 2  # of the U-ViT
    decoder_blocks: int = 2  # of the U-ViT
    time_mean: float = 0.0  # mean of the normal distribution of logit(t) in training
    time_std: float = 1.0  # its standard deviation
    hidden_condition: bool = True  # unconditional rows attend to the prompt's first position; False: to pads
    align_layer: int | None = None  # backbone layer for the loss "align"; None: no such loss; JanusFlow: 6
    align_dim: int = 1024  # feature_dim of the understanding encoder, with which the layer is aligned
    align_weight: float = 0.5  # of the loss "align", as in REPA (Yu et al. 2024)

    def __post_init__(self) -> None:
        """Check the sizes."""
        check_sizes(
            self, height=1, width=1, channels=2, patch_size=1, encoder_blocks=1, decoder_blocks=1, time_std=0,
            align_dim=1, align_weight=0,
        )  # fmt: skip
        if self.channels % 2:
            raise ValueError(f"channels: {self.channels}; expected an even number, of sines and cosines.")


class Mixtures(NamedTuple):
    """Latents of images, and the noise and times of their mixtures, sampled for one training step."""

    encoded: Tensor  # (N, c, h, w)
    noise: Tensor  # (N, c, h, w)
    time: Tensor  # (N,), 0 for noise and 1 for the image

    def mixed(self) -> Tensor:
        """Return the mixtures (N, c, h, w)."""
        time = self.time[:, None, None, None]
        return time * self.encoded + (1 - time) * self.noise


class RectifiedFlow(nn.Module):
    """Predicts velocities from noise to latents."""

    predicts_next = False
    image_sampler = "rectified-flow"
    frozen_submodules: tuple[str, ...] = ("autoencoder",)  # no loss reaches it: latents are targets

    def __init__(
        self,
        config: RectifiedFlowConfig,
        autoencoder: ImageAutoencoder,
        adaptor: Adaptor,
        grid: tuple[int, int],
        hidden_size: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.hidden_condition = config.hidden_condition
        self.autoencoder = autoencoder
        self._set_size(config.height, config.width, grid)
        sizes = (self.shape[0], config.channels, config.patch_size)
        self.encoder = UViTEncoder(*sizes, config.encoder_blocks, hidden_size)
        self.adaptor = adaptor
        self.decoder_norm = nn.RMSNorm(hidden_size, eps=EPS)
        self.decoder_adaptor = nn.Linear(hidden_size, config.channels)
        self.decoder = UViTDecoder(*sizes, config.decoder_blocks, hidden_size)
        self.align_layer = config.align_layer
        self.align_shape = (grid[0] * grid[1], config.align_dim)
        self.aligner = None if config.align_layer is None else aligner(hidden_size, config.align_dim)

    @classmethod
    def build(cls, config: RectifiedFlowConfig, hidden_size: int, build: Callable[..., Any]) -> RectifiedFlow:
        """Build the path for a backbone of ``hidden_size``; ``build`` makes its components."""
        autoencoder = build(config.autoencoder)
        adaptor = build(config.adaptor, config.channels, hidden_size)
        grid = patch_grid(config, autoencoder, adaptor, config.height, config.width)
        return cls(config, autoencoder, adaptor, grid, hidden_size)

    def sized(self, height: int, width: int) -> RectifiedFlow:
        """Return this path for images of another size, with the same modules.

        Raises:
            ValueError: the autoencoder cannot encode the size, or the adaptor would not keep each patch.
        """
        path = copy(self)
        path._set_size(height, width, patch_grid(self.config, self.autoencoder, self.adaptor, height, width))
        return path

    def _set_size(self, height: int, width: int, grid: tuple[int, int]) -> None:
        """Set what follows from the size of images."""
        self.height, self.width = height, width
        self.shape = self.autoencoder.encoded_shape(height, width)  # (c, h, w)
        self.grid = grid  # of patches
        self.num_tokens = 1 + grid[0] * grid[1]  # the time, and the patches
        self.sizes: Mapping[str, Any] = {
            "encoded_shape": list(self.shape),
            "hidden_condition": self.hidden_condition,
        }

    @torch.no_grad()
    def targets(self, pixels: Tensor, rngs: Sequence[np.random.Generator]) -> Mixtures:
        """Encode images (N, 3, height, width), uint8, and draw the noise and the time of each.

        The logits of times are normal, as in Stable Diffusion 3 (Esser et al. 2024).
        """
        encoded = self.encode_image(pixels)
        noise = np.stack([rng.standard_normal(self.shape, np.float32) for rng in rngs])
        logits = np.array([rng.normal(self.config.time_mean, self.config.time_std) for rng in rngs])
        time = (1 / (1 + np.exp(-logits))).astype(np.float32)
        return Mixtures(
            encoded, torch.from_numpy(noise).to(encoded), torch.from_numpy(time).to(encoded.device)
        )

    def embed(self, targets: Mixtures) -> Tensor:
        """Embed the times and the mixtures as (N, num_tokens, D)."""
        return self.embeddings(*self.encoder(targets.mixed().to(self.dtype), targets.time))

    def losses(self, hidden: Tensor, targets: Mixtures) -> Mapping[str, Tensor]:
        """Return the mean squared error (N,) of velocities, from the hidden states (N, num_tokens, D)."""
        skip, time = self.encoder(targets.mixed().to(self.dtype), targets.time)
        predicted = self.velocity(hidden, skip, time).float()
        errors = F.mse_loss(predicted, targets.encoded - targets.noise, reduction="none")
        return {"image": errors.mean((1, 2, 3))}

    def alignment(self, states: Tensor, features: Tensor) -> Mapping[str, Tensor]:
        """Return the negative cosine (N, P) of projected states (N, num_tokens, D) and features (N, P, C)."""
        projected = cast(nn.Module, self.aligner)(states[:, 1:])  # (N, P, C)
        cosine = F.cosine_similarity(projected.float(), features.float(), dim=-1)  # (N, P)
        return {"align": -self.config.align_weight * F.pad(cosine, (1, 0))}  # 0 at the position of the time

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the U-ViT."""
        return self.decoder_adaptor.weight.dtype

    def embeddings(self, skip: Tensor, time: Tensor) -> Tensor:
        """Return the embeddings (N, num_tokens, D) of features (N, C, h, w) and embedded times (N, D)."""
        patches = self.adaptor(skip.flatten(2).transpose(1, 2), self.grid)  # (N, P, D)
        return torch.cat([time[:, None], patches], dim=1)

    def velocity(self, hidden: Tensor, skip: Tensor, time: Tensor) -> Tensor:
        """Return the velocities (N, c, h, w) that hidden states (N, num_tokens, D) predict."""
        x = self.decoder_adaptor(self.decoder_norm(hidden[:, 1:]))  # (N, P, C)
        return self.decoder(x.transpose(1, 2).unflatten(2, self.grid), skip, time)

    def embed_mixture(self, mixture: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Embed mixtures (N, c, h, w) at time () as (N, num_tokens, D); return also the U-ViT's long skip."""
        skip, embedded = self.encoder(mixture.to(self.dtype), time.expand(mixture.shape[0]))
        return self.embeddings(skip, embedded), skip

    def advance(
        self, hidden: Tensor, skip: Tensor, mixture: Tensor, time: Tensor, step: Tensor, guidance: Tensor
    ) -> Tensor:
        """Return mixtures (N, c, h, w) after an Euler step of length ``step`` along the guided velocity.

        ``hidden`` is (2N, num_tokens, D), conditional rows first, or (N, ...) for guidance 1. Guidance as in
        JanusFlow, section 3.1: v = u + w (c - u).
        """
        images = mixture.shape[0]
        embedded = self.encoder.time_embed(time.expand(hidden.shape[0]))
        rows = hidden.shape[0] // images
        predicted = self.velocity(hidden, skip.repeat(rows, 1, 1, 1), embedded).float()  # (R, c, h, w)
        conditional, unconditional = predicted[:images], predicted[-images:]
        return mixture + step * (unconditional + guidance * (conditional - unconditional))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode images (N, 3, height, width), uint8, as latents (N, c, h, w) in float32."""
        low, high = self.autoencoder.value_range
        return self.autoencoder.encode(pixels.to(self.dtype) / 255 * (high - low) + low).float()

    def decode_image(self, encoded: Tensor) -> Tensor:
        """Decode latents (N, c, h, w) into images (N, 3, height, width), uint8; values are rounded."""
        low, high = self.autoencoder.value_range
        x = self.autoencoder.decode(encoded.to(self.dtype), height=self.height, width=self.width).float()
        if not (torch.compiler.is_exporting() or x.is_meta) and not x.isfinite().all():
            raise NotFiniteError(
                f"the image autoencoder's decoder gives NaN or infinities in {encoded.shape[0]} images;"
                f" expected values from {low} to {high}. Load it in float32 or bfloat16 (--dtype)."
            )
        return ((x - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)

    def graphs(self) -> Sequence[GraphSpec]:
        """Return the graphs: embedding of mixtures, an Euler step, the autoencoder's decoder and encoder."""
        numbers = ("images", *self.shape)
        scalar = {name: TensorSpec(name, "float32", ()) for name in ("time", "step", "guidance")}
        mixture, encoded, advanced = (
            TensorSpec(name, "float32", numbers) for name in ("mixture", "encoded", "advanced")
        )
        skip = TensorSpec("skip", "model", ("images", self.config.channels, *self.grid))
        positions = (self.num_tokens, self.hidden_size)
        embeddings = TensorSpec("embeddings", "model", ("images", *positions))
        hidden = TensorSpec("hidden", "model", ("rows", *positions))
        pixels = TensorSpec("pixels", "uint8", ("images", 3, self.height, self.width))
        return [
            GraphSpec("embed_mixture", self.embed_mixture, (mixture, scalar["time"]), (embeddings, skip)),
            GraphSpec(
                "advance",
                self.advance,
                (hidden, skip, mixture, *scalar.values()),
                (advanced,),
            ),
            GraphSpec("decode_image", self.decode_image, (encoded,), (pixels,), role="decode"),
            GraphSpec("encode_image", self.encode_image, (pixels,), (encoded,), role="encode"),
        ]


def patch_grid(
    config: RectifiedFlowConfig, autoencoder: ImageAutoencoder, adaptor: Adaptor, height: int, width: int
) -> tuple[int, int]:
    """Return the rows and columns of patches of an image's encoded numbers.

    Raises:
        ValueError: patches do not cover the encoded image, or the adaptor would not keep each patch.
    """
    _, *sides = autoencoder.encoded_shape(height, width)
    if any(side % config.patch_size for side in sides):
        raise ValueError(
            f"'{config.autoencoder.name}' encodes an image of {height}x{width} as {sides[0]}x{sides[1]};"
            f" expected a multiple of patch_size {config.patch_size} on both sides"
        )
    grid = (sides[0] // config.patch_size, sides[1] // config.patch_size)
    if (positions := adaptor.num_tokens(grid)) != grid[0] * grid[1]:
        raise ValueError(
            f"'{config.adaptor.name}' makes {positions} positions of {grid[0]}x{grid[1]} patches, and each"
            " patch has to keep its own: choose another adaptor"
        )
    return grid


def aligner(hidden_size: int, align_dim: int) -> nn.Sequential:
    """Return an MLP of three linear layers from hidden states (..., D) to features (..., align_dim)."""
    return nn.Sequential(
        nn.Linear(hidden_size, hidden_size),
        nn.SiLU(),
        nn.Linear(hidden_size, hidden_size),
        nn.SiLU(),
        nn.Linear(hidden_size, align_dim),
    )


@hookimpl
def register_generation(registry: Registry[GenerationPath]) -> None:
    """Register JanusFlow's path."""
    registry.add("rectified-flow", RectifiedFlow.build, RectifiedFlowConfig)
