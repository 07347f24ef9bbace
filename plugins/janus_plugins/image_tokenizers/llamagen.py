"""The image tokenizer `llamagen`: LlamaGen's VQ-16, the tokenizer of Janus and Janus-Pro, and VQ-8.

VQGAN's convolutional encoder and decoder, with a low-dimensional codebook of unit length (ViT-VQGAN,
section 3.2). VQ-16 is the default; VQ-8 is ``channel_multipliers: [1, 2, 2, 4]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from janus_modular import CheckpointError, ImageTokenizer, Reconstruction, Registry, belongs_to, hookimpl
from janus_plugins.image_tokenizers.codebook import Codebook, entropy_loss, straight_through
from janus_plugins.image_tokenizers.convolutional import ConvolutionalConfig, ConvolutionalTokenizer


@dataclass
class LlamaGenConfig(ConvolutionalConfig):
    """The published VQ-16: factor 16, 71.883 M parameters."""

    code_dim: int = 8  # of a code's own vector
    l2_norm: bool = True  # codes and latents are compared, and decoded, at unit length
    reconstruction: Literal["l1", "l2"] = "l2"  # the distance of the loss "pixels"
    commitment: float = 0.25  # weight of the loss that pulls latents to their codes
    entropy: float = 0.0  # weight of the loss that spreads the codes' use; 0: not computed
    entropy_temperature: float = 0.01  # of the soft assignment of latents to codes in it


class LlamaGenTokenizer(ConvolutionalTokenizer):
    """Images in [-1, 1] to code ids and back; runs in the dtype of its weights.

    Codebook and latents are normalised in ``encode``, the codebook in ``decode``: the published codebook's
    vectors do not have unit length, and without normalisation the codes would be others.
    """

    name = "llamagen"

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config, Codebook(config.num_codes, config.code_dim, unit=config.l2_norm))
        self.config = config

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the losses ``pixels``, ``codebook``, ``commitment`` and, if weighted, ``entropy``.

        The gradient of the quantisation is straight-through. The published tokenizers were also trained with
        a perceptual and an adversarial loss.
        """
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode pixels (N, 3, H, W), with straight-through gradients."""
        latents = self.latents(pixels)  # (N, P, code_dim)
        codes = self.quantize.nearest(latents)
        vectors = self.quantize(codes)
        decoded = self.decode_vectors(straight_through(latents, vectors), self.grid(*pixels.shape[-2:]))
        losses = {
            "codebook": F.mse_loss(vectors, latents.detach()),
            "commitment": self.config.commitment * F.mse_loss(latents, vectors.detach()),
        }
        if self.config.entropy:
            logits = self.quantize.scores(latents) / self.config.entropy_temperature
            losses["entropy"] = self.config.entropy * entropy_loss(logits)
        return Reconstruction(decoded, losses, self.config.reconstruction, codes)

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read LlamaGen's files, or the tokenizer of a published or a transformers Janus checkpoint.

        The prefix (``ema.``, ``model.``, ``gen_vision_model.``, ``model.vqmodel.``) is that of the codebook;
        ``ema`` takes precedence in files with several, such as LlamaGen's.
        """
        anchor = "quantize.embedding.weight"
        prefixes = [name.removesuffix(anchor) for name in weights if name.endswith(anchor)]
        if not prefixes:
            raise CheckpointError(
                f"llamagen found no codebook: no name ends in '{anchor}'; pass LlamaGen's or Janus'"
            )
        prefix = min(prefixes, key=lambda prefix: not prefix.startswith("ema."))
        for name in weights:
            own = published_name(name.removeprefix(prefix)) if name.startswith(prefix) else ""
            if own == "quantize.codebook_used":
                _ = weights[name]  # training statistics: read, so that they are not reported as unexpected
            elif belongs_to(own, self):
                yield own, weights[name]


def published_name(name: str) -> str:
    """Return the published name for a name of transformers; published names are unchanged."""
    name = re.sub(r"\.(down|up)\.(\d+)\.", r".conv_blocks.\2.", name).replace(".block.", ".res.")
    for i, block in enumerate(("block_1", "attn_1", "block_2")):
        name = name.replace(f".mid.{block}.", f".mid.{i}.")
    return name


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register this tokenizer."""
    registry.add("llamagen", LlamaGenTokenizer, LlamaGenConfig)
