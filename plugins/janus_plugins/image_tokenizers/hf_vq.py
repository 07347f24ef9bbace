"""The image tokenizer `hf-vq`: Emu3's, of transformers.

tokenizer: {name: hf-vq, pretrained: BAAI/Emu3-VisionTokenizer}                  # config, weights: a folder's
tokenizer: {name: hf-vq, config: {model_type: emu3_vqgan, codebook_size: 4096}}  # or random weights

It has factor 8 and 32,768 codes of 4 numbers. It is made for videos, ``temporal_downsample_factor`` frames
a code: an image is encoded as a clip of equal frames, and decoded as the first frame of a clip.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, Emu3VQVAE

from janus_modular import (
    CheckpointError,
    ComponentConfig,
    ConfigError,
    ImageTokenizer,
    Reconstruction,
    Registry,
    belongs_to,
    hookimpl,
    read_json,
    refuse_quantized,
    resolve_pretrained,
)
from janus_plugins.hf_config_keys import check_keys
from janus_plugins.hf_folders import check_described, describing_folder
from janus_plugins.image_tokenizers.codebook import Codebook, straight_through
from janus_plugins.sizes import squares

ELSEWHERE = {
    "chameleon": "has no decoder in transformers: {name: vqgan, num_codes: 8192, attention: false} reads "
    "Chameleon's own vqgan.ckpt",
    "janus": "is read by llamagen",
}
"""Other tokenizers of transformers, by prefixes of model_type, with what to use for them."""

PUBLISHED_KEYS = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}
"""Keys of the published config, and transformers' keys."""

PUBLISHED_NAMES = (
    (r"^(en|de)coder\.(down|up)\.", r"\1coder.\2_block.\2."),
    (r"^(en|de)coder\.mid\.", r"\1coder.middle_block."),
    (r"\.attn_1\.norm\.", ".attn_norm."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1."),
    (r"(\.attn(?:_1|\.\d+))\.([qkv])\.", r"\1.\2_proj."),
    (r"(\.attn(?:_1|\.\d+))\.proj_out\.", r"\1.out_proj."),
)
"""Substitutions that map published names of weights to transformers', in this order."""


@dataclass
class HfVqConfig(ComponentConfig):
    """A tokenizer, described by a transformers config or by the config beside its weights.

    With ``pretrained``, the model is built by the folder's config.json; every key of ``config`` must have the
    same value there.
    """

    config: dict[str, Any] | None = None  # transformers' keys; None: those beside `pretrained`
    reconstruction: Literal["l1", "l2"] = "l2"  # the distance of the loss "pixels"
    commitment: float = 0.25  # weight of the loss that pulls latents to their codes


class HfVqTokenizer(nn.Module):
    """Images in [-1, 1] to code ids and back; runs in the dtype of its weights.

    Batch norms use their stored statistics in training too: with batch statistics, rows would not be
    independent, and the codes that a model learns to predict would change.
    """

    value_range = (-1.0, 1.0)

    def __init__(self, config: HfVqConfig) -> None:
        super().__init__()
        family = vq_config(config)
        self.model = Emu3VQVAE._from_config(copy.deepcopy(family), dtype=torch.get_default_dtype())
        quantize = Codebook(family.codebook_size, family.embed_dim)  # computes distances in float32
        quantize.embedding = self.model.quantize.embedding
        self.model.quantize = quantize
        self.codebooks: tuple[int, ...] = (family.codebook_size,)
        self.code_dim: int | None = family.embed_dim
        self.frames: int = family.temporal_downsample_factor
        self.factor: int = self.model.spatial_scale_factor
        keys = {**family.to_diff_dict(), "model_type": family.model_type}
        self.config = replace(config, pretrained=None, revision=None, config=keys)

    def train(self, mode: bool = True) -> HfVqTokenizer:
        """Set the training mode; batch norms stay in evaluation mode."""
        super().train(mode)
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm3d):
                layer.eval()
        return self

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of codes: one for each square of ``factor`` pixels."""
        return squares("hf-vq", height, width, self.factor)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into code ids (N, P)."""
        return self.model.quantize.nearest(self.latents(pixels))

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids (N, P) into pixels (N, 3, height, width), not clipped to the range."""
        grid = self.grid(height, width)
        if codes.shape[-1] != grid[0] * grid[1]:
            raise ValueError(f"hf-vq: {codes.shape[-1]} codes do not fill a grid of {grid[0]}x{grid[1]}")
        return self.decode_vectors(self.model.quantize(codes), grid)

    def codebook_embeddings(self) -> Tensor:
        """Return the codebook (K, code_dim)."""
        return self.model.quantize.vectors()

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the losses ``pixels``, ``codebook`` and ``commitment``, which are to be added.

        Emu3's tokenizer was also trained with a perceptual and an adversarial loss.
        """
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode pixels (N, 3, H, W), with straight-through gradients."""
        latents = self.latents(pixels)  # (N, P, code_dim)
        codes = self.model.quantize.nearest(latents)
        vectors = self.model.quantize(codes)
        decoded = self.decode_vectors(straight_through(latents, vectors), self.grid(*pixels.shape[-2:]))
        losses = {
            "codebook": F.mse_loss(vectors, latents.detach()),
            "commitment": self.config.commitment * F.mse_loss(latents, vectors.detach()),
        }
        return Reconstruction(decoded, losses, self.config.reconstruction, codes)

    def latents(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W), as a clip of equal frames, into latents (N, P, code_dim).

        Layers before the temporal ones run on a single frame.
        """
        self.grid(*pixels.shape[-2:])
        encoder = self.model.encoder
        x = encoder.down_block(encoder.conv_in(pixels.to(self.model.dtype)))
        x = encoder.conv_out(F.silu(encoder.norm_out(encoder.middle_block(x))))  # (N, c, h, w)
        x = x.unsqueeze(2).repeat(1, 1, self.frames, 1, 1)  # (N, c, T, h, w)
        for halve in encoder.time_conv:
            x = F.silu(halve(x))
        for refine in encoder.time_res_stack:
            x = refine(x)
        return self.model.quant_conv(x).flatten(2).transpose(1, 2)  # of a single frame

    def decode_vectors(self, vectors: Tensor, grid: tuple[int, int]) -> Tensor:
        """Decode code vectors (N, P, code_dim) into pixels, the first frame of a clip."""
        codes = vectors.transpose(1, 2).unflatten(2, (1, *grid))  # (N, code_dim, 1, h, w)
        decoder, latents = self.model.decoder, self.model.post_quant_conv(codes)
        x, condition = self._first_frame(latents), self._first_frame(codes)
        x = decoder.middle_block(decoder.conv_in(x), condition)
        x = decoder.norm_out(decoder.up_block(x, condition), condition)
        return decoder.conv_out(F.silu(x))

    def _first_frame(self, x: Tensor) -> Tensor:
        """Run the temporal layers on (N, c, 1, h, w); return the first frame (N, c, h, w)."""
        for refine in self.model.decoder.time_res_stack:
            x = refine(x)
        for double in self.model.decoder.time_conv:
            x = F.silu(double(x))
        return x[:, :, 0]

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the tokenizer that Emu3's authors published, transformers', or the one inside its Emu3.

        Attention of the first is in convolutions of one pixel, of the others in linear layers.
        """
        anchor = "quantize.embedding.weight"
        prefix = next((name.removesuffix(anchor) for name in weights if name.endswith(anchor)), None)
        if prefix is None:
            raise CheckpointError(f"hf-vq found no codebook: no name ends in '{anchor}'; pass Emu3's")
        known = self.model.state_dict()
        for name in weights:
            own = transformers_name(name.removeprefix(prefix)) if name.startswith(prefix) else ""
            if belongs_to(own, self.model):
                weight = weights[name]
                flat = own in known and known[own].ndim == 2
                yield f"model.{own}", weight.flatten(1) if flat else weight


def transformers_name(name: str) -> str:
    """Return transformers' name for a published name; transformers' names are unchanged."""
    for pattern, replacement in PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def vq_config(config: HfVqConfig) -> Any:
    """Return the tokenizer's transformers config: the one beside the weights, or that of ``config``."""
    path = resolve_pretrained(config.pretrained, config.revision) if config.pretrained else None
    described = read_keys(path) if path else {}
    keys = {**described, **(config.config or {})}
    if "model_type" not in keys:
        raise ConfigError(
            "hf-vq: give config (transformers' keys, model_type: emu3_vqgan) or pretrained (a folder with "
            "config.json, or a hub id)"
        )
    model_type = keys["model_type"]
    if model_type != "emu3_vqgan":
        why = next(
            (ELSEWHERE[name] for name in ELSEWHERE if model_type.startswith(name)), "cannot draw images"
        )
        raise ConfigError(f"hf-vq reads emu3_vqgan; '{model_type}' {why}.")
    check_keys(keys, "hf-vq: config", [model_type])
    family = AutoConfig.for_model(**copy.deepcopy(described or keys))
    if described and path:
        check_described(config.config or {}, [family], path)
    widest = family.base_channels * family.channel_multiplier[-1]
    if family.hidden_size != widest:
        raise ConfigError(
            f"hf-vq: hidden_size {family.hidden_size}, but the last level has {widest} channels "
            "(base_channels times the last channel_multiplier): they must be equal"
        )
    if family.latent_channels != family.embed_dim:  # one stack of the decoder's takes latents and codes
        raise ConfigError(
            f"hf-vq: latent_channels {family.latent_channels} and embed_dim {family.embed_dim}: they must"
            " be equal"
        )
    return family


def read_keys(path: Path) -> dict[str, Any]:
    """Return transformers' keys from the config.json in a folder, or beside a file, in either format.

    {} if there is none, or if the one beside a file is of another model.
    """
    folder = describing_folder(path)
    if not (folder / "config.json").is_file():
        return {}
    refuse_quantized(path)
    keys = read_json(folder / "config.json", CheckpointError)
    keys = keys.get("vq_config", keys)
    if path.is_file() and keys.get("model_type") not in ("Emu3VisionVQ", "emu3_vqgan"):
        return {}
    if keys.get("model_type") == "Emu3VisionVQ":
        keys = {PUBLISHED_KEYS.get(key, key): value for key, value in keys.items()}
        keys |= {
            "model_type": "emu3_vqgan",
            "hidden_size": keys["base_channels"] * keys["channel_multiplier"][-1],
        }
    kept = {*Emu3VQVAE.config_class().to_dict(), "model_type"} - {"architectures", "dtype"}
    return {key: value for key, value in keys.items() if key in kept}


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register this tokenizer."""
    registry.add("hf-vq", HfVqTokenizer, HfVqConfig)
