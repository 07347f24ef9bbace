"""The image tokenizer `vqgan`, of taming-transformers, and of others with its architecture.

The published models have factor 16 and codes of 256 numbers: on ImageNet with 16,384
codes (the defaults) or 1,024 (``num_codes: 1024``); Chameleon's, for images of 512 x 512, is
``{num_codes: 8192, attention: false}``. Latent diffusion's vq-f4 has factor 4 and codes of 3 numbers:
``{channel_multipliers: [1, 2, 4], latent_channels: 3, code_dim: 3, num_codes: 8192, attention: false}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from janus_modular import ImageTokenizer, Reconstruction, Registry, belongs_to, hookimpl
from janus_plugins.image_tokenizers.codebook import Codebook, straight_through
from janus_plugins.image_tokenizers.convolutional import ConvolutionalConfig, ConvolutionalTokenizer
from janus_plugins.image_tokenizers.taming_names import STATISTICS, find_prefix, own_name


@dataclass
class VqganConfig(ConvolutionalConfig):
    """The published f16 of ImageNet."""

    attention: bool = True  # after each residual block of the lowest resolution; between the halves always
    reconstruction: Literal["l1", "l2"] = "l1"  # the distance of the loss "pixels"
    codebook: float = 0.25  # weight of the loss that pulls codes to their latents
    commitment: float = 1.0  # weight of the loss that pulls latents to their codes


class VqganTokenizer(ConvolutionalTokenizer):
    """Images in [-1, 1] to code ids and back; runs in the dtype of its weights."""

    name = "vqgan"

    def __init__(self, config: VqganConfig) -> None:
        super().__init__(config, Codebook(config.num_codes, config.code_dim), attention=config.attention)
        self.config = config

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the losses ``pixels``, ``codebook`` and ``commitment``, which are to be added.

        VQ-VAE weights the commitment by 0.25, VQGAN's published code the codebook, as the defaults here. The
        published models were also trained with a perceptual and an adversarial loss.
        """
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode pixels (N, 3, H, W), with straight-through gradients."""
        latents = self.latents(pixels)  # (N, P, code_dim)
        codes = self.quantize.nearest(latents)
        vectors = self.quantize(codes)
        decoded = self.decode_vectors(straight_through(latents, vectors), self.grid(*pixels.shape[-2:]))
        losses = {
            "codebook": self.config.codebook * F.mse_loss(vectors, latents.detach()),
            "commitment": self.config.commitment * F.mse_loss(latents, vectors.detach()),
        }
        return Reconstruction(decoded, losses, self.config.reconstruction, codes)

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read taming-transformers' files, Chameleon's vqgan.ckpt, or the tokenizer inside a larger model.

        The discriminator, the perceptual network (``loss.``) and statistics of the codebook are ignored.
        """
        prefix = find_prefix(weights, self.name)
        for name in weights:
            source_name = name.removeprefix(prefix) if name.startswith(prefix) else ""
            own = own_name(source_name, len(self.config.channel_multipliers))
            if source_name.startswith("loss.") or source_name in STATISTICS:
                _ = weights[name]  # read, so that it is not reported as unexpected
            elif belongs_to(own, self):
                yield own, weights[name]


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register this tokenizer."""
    registry.add("vqgan", VqganTokenizer, VqganConfig)
