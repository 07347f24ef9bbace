"""The image autoencoder `autoencoder-kl`, of latent diffusion (Rombach et al. 2022) and of diffusers.

autoencoder: {name: autoencoder-kl, pretrained: stabilityai/sdxl-vae}  # the defaults; JanusFlow's

This VAE is VQGAN's encoder and decoder with a normal distribution in place of the codebook. Latents are the
mean of it. Stable Diffusion 1's VAE has ``{scaling_factor: 0.18215}``, Stable Diffusion 3's
``{latent_channels: 16, scaling_factor: 1.5305, shift_factor: 0.0609, quant_conv: false}``, and Flux's
``{latent_channels: 16, scaling_factor: 0.3611, shift_factor: 0.1159, quant_conv: false}``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from janus_modular import (
    CheckpointError,
    ComponentConfig,
    DescriptionError,
    Difference,
    ImageAutoencoder,
    Reconstruction,
    Registry,
    belongs_to,
    hookimpl,
    read_json,
    resolve_pretrained,
)
from janus_plugins.image_tokenizers.convolutional import ConvolutionalConfig, build_decoder, build_encoder
from janus_plugins.image_tokenizers.taming_names import own_name
from janus_plugins.sizes import check_sizes, squares

DIFFUSERS_NAMES = (
    (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.conv_blocks.\1."),
    (r"^decoder\.up_blocks\.(\d+)\.", r"decoder.conv_blocks.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.0."),
    (r"\.mid_block\.attentions\.0\.", ".mid.1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.2."),
    (r"\.resnets\.(\d+)\.", r".res.\1."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"(\.mid\.1)\.group_norm\.", r"\1.norm."),
    (r"(\.mid\.1)\.(?:to_q|query)\.", r"\1.q."),
    (r"(\.mid\.1)\.(?:to_k|key)\.", r"\1.k."),
    (r"(\.mid\.1)\.(?:to_v|value)\.", r"\1.v."),
    (r"(\.mid\.1)\.(?:to_out\.0|proj_attn)\.", r"\1.proj_out."),
)
"""Substitutions that map diffusers' names, older ones too, to native names, in this order."""

FIRST_STAGE = "first_stage_model."
"""The prefix of the autoencoder in the single files of latent diffusion."""


@dataclass
class AutoencoderKlConfig(ComponentConfig):
    """Sizes; the defaults are those of Stable Diffusion XL's."""

    channels: int = 128  # of the highest resolution
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # one per resolution
    residual_blocks: int = 2  # per resolution; the decoder has one more
    latent_channels: int = 4  # of the latents
    quant_conv: bool = True  # a 1 x 1 convolution on each side of the encoded image
    scaling_factor: float = 0.13025  # encoded images are multiplied by it, for unit variance
    shift_factor: float = 0.0  # is subtracted from encoded images first
    kl: float = 1e-6  # weight of the loss that pulls distributions to the standard normal

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not self.channel_multipliers:
            raise ValueError("channel_multipliers: []; expected at least one resolution.")
        check_sizes(self, channels=1, channel_multipliers=1, residual_blocks=1, latent_channels=1)
        if not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor: {self.scaling_factor}; expected a number above 0.")


class AutoencoderKl(nn.Module):
    """Images in [-1, 1] to numbers (N, C, h, w) and back; runs in the dtype of its weights."""

    value_range = (-1.0, 1.0)

    def __init__(self, config: AutoencoderKlConfig) -> None:
        super().__init__()
        if config.pretrained:
            check_description(config, resolve_pretrained(config.pretrained, config.revision))
        self.config = config
        self.factor = 2 ** (len(config.channel_multipliers) - 1)
        moments = 2 * config.latent_channels  # mean, and logarithm of the variance
        self.encoder = build_encoder(convolutions(config, moments), attention=False)
        self.decoder = build_decoder(convolutions(config, config.latent_channels), attention=False)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = (
            nn.Conv2d(config.latent_channels, config.latent_channels, 1)
            if config.quant_conv
            else nn.Identity()
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def encoded_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of an encoded image: a number in each channel for ``factor`` pixels."""
        return self.config.latent_channels, *squares("autoencoder-kl", height, width, self.factor)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) as the means (N, C, h, w), shifted and scaled."""
        mean, _ = self.moments(pixels)
        return (mean - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, encoded: Tensor, *, height: int, width: int) -> Tensor:
        """Decode numbers (N, C, h, w) into pixels (N, 3, height, width), not clipped to the range."""
        shape = self.encoded_shape(height, width)
        if tuple(encoded.shape[1:]) != shape:
            raise ValueError(f"autoencoder-kl: found images of {tuple(encoded.shape[1:])}; expected {shape}")
        x = encoded.to(self.dtype)
        return self.decoder(self.post_quant_conv(x / self.config.scaling_factor + self.config.shift_factor))

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the losses ``pixels`` (L1) and ``kl``, which are to be added.

        The distance of the distributions is summed over an image and divided by its number of pixels, as the
        published code does. The published models were also trained with a perceptual and an adversarial loss.
        """
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode pixels (N, 3, H, W) as distributions, and decode a sample of each."""
        mean, log_variance = self.moments(pixels)
        sampled = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        decoded = self.decoder(self.post_quant_conv(sampled))
        distance = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return Reconstruction(decoded, {"kl": self.config.kl * distance / pixels.numel()}, "l1")

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pixels (N, 3, H, W) as means and logarithms of variances, both (N, C, h, w)."""
        self.encoded_shape(*pixels.shape[-2:])
        x = self.quant_conv(self.encoder(pixels.to(self.dtype)))
        mean, log_variance = x.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)  # as published: no variance overflows

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read diffusers' files, or an autoencoder of latent diffusion, alone or in a single file."""
        prefix = FIRST_STAGE if any(name.startswith(FIRST_STAGE) for name in weights) else ""
        for name in weights:
            source_name = name.removeprefix(prefix) if name.startswith(prefix) else ""
            own = native_name(source_name, len(self.config.channel_multipliers))
            if source_name.startswith("loss."):
                _ = weights[name]  # read, so that it is not reported as unexpected
            elif belongs_to(own, self):
                weight = weights[name]
                # Newer diffusers' attention has linear layers, of the same weights as 1 x 1 convolutions.
                is_linear = weight.ndim == 2 and ".mid.1." in own
                yield own, weight[:, :, None, None] if is_linear else weight


def convolutions(config: AutoencoderKlConfig, channels: int) -> ConvolutionalConfig:
    """Return the sizes of a convolutional encoder or decoder with so many channels at its narrow end."""
    return ConvolutionalConfig(
        channels=config.channels,
        channel_multipliers=config.channel_multipliers,
        residual_blocks=config.residual_blocks,
        latent_channels=channels,
    )


def native_name(name: str, levels: int) -> str:
    """Return the native name of a weight in diffusers' or latent diffusion's names."""
    name = own_name(name, levels)
    for pattern, replacement in DIFFUSERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def check_description(config: AutoencoderKlConfig, path: Path) -> None:
    """Check the options against diffusers' config.json beside the weights; there may be none.

    Raises:
        CheckpointError: the folder describes another autoencoder.
        DescriptionError: names the options that differ.
    """
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        return
    described = read_json(folder / "config.json", CheckpointError)
    cls = described.get("_class_name", "AutoencoderKL")
    norm_groups, activation = described.get("norm_num_groups", 32), described.get("act_fn", "silu")
    if (cls, norm_groups, activation) != ("AutoencoderKL", 32, "silu"):
        raise CheckpointError(
            f"{folder}: found the class {cls} with norm_num_groups {norm_groups} and act_fn {activation};"
            " expected AutoencoderKL with 32 and silu. Choose weights of such an autoencoder."
        )
    differences = [
        Difference(key, getattr(config, key), value)
        for key, value in _options(described).items()
        if getattr(config, key) != value
    ]
    if differences:
        raise DescriptionError(str(path), differences)


def _options(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that diffusers' config describes."""
    renamed = {"layers_per_block": "residual_blocks", "use_quant_conv": "quant_conv"}
    same = ("latent_channels", "scaling_factor", "shift_factor")
    options = {own: described[key] for key, own in renamed.items() if key in described}
    options |= {key: described[key] for key in same if described.get(key) is not None}
    if sizes := described.get("block_out_channels"):
        options["channels"] = sizes[0]
        ratios = [size / sizes[0] for size in sizes]
        options["channel_multipliers"] = [int(ratio) if ratio.is_integer() else ratio for ratio in ratios]
    return options


@hookimpl
def register_image_autoencoders(registry: Registry[ImageAutoencoder]) -> None:
    """Register this autoencoder."""
    registry.add("autoencoder-kl", AutoencoderKl, AutoencoderKlConfig)
