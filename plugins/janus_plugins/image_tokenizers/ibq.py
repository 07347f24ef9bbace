"""The image tokenizer `ibq` (Shi et al. 2024): a VQGAN with a large codebook.

A latent is assigned to the code with the largest dot product. In training, the gradient passes through the
softmax of the products to the whole codebook, which keeps all 262,144 codes in use. The defaults are those of
the published tokenizers, with ``num_codes`` 1024, 8192, 16384 or 262144. Emu3.5's tokenizer is one too:
``{channels: 256, num_codes: 131072}``, 455 M parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ImageTokenizer, Reconstruction, Registry, hookimpl
from janus_plugins.image_tokenizers.codebook import Codebook, entropy_loss
from janus_plugins.image_tokenizers.convolutional import ConvolutionalConfig, ConvolutionalTokenizer
from janus_plugins.image_tokenizers.ema import ema_weights_first
from janus_plugins.image_tokenizers.taming_names import find_prefix, own_name


@dataclass
class IbqConfig(ConvolutionalConfig):
    """The published tokenizer of 16,384 codes."""

    residual_blocks: int = 4  # per resolution; the decoder has one more
    codebook: float = 0.25  # weight of the loss that moves selected codes to their latents
    entropy: float = 0.05  # weight of the loss that spreads the codes' use; 0: not computed
    entropy_temperature: float = 0.01  # of the softmax in it


class IbqCodebook(Codebook):
    """A codebook that assigns a latent to the code with the largest dot product."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__(num_codes, code_dim)
        nn.init.normal_(self.embedding.weight)

    def scores(self, latents: Tensor) -> Tensor:
        """Return the dot products (..., K) of latents (..., code_dim) with all codes, in float32."""
        return latents.float() @ self.vectors().float().T

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of the largest scores (..., K), twice: (..., code_dim) each, equal in value.

        The gradient of the first reaches the scores and all codes by the softmax; that of the second reaches
        the selected codes alone.
        """
        hard = self(scores.argmax(-1))
        soft = (scores.softmax(-1) @ self.vectors().detach().float()).to(hard.dtype)
        return hard + (soft - soft.detach()), hard


class IbqTokenizer(ConvolutionalTokenizer):
    """Images in [-1, 1] to code ids and back; runs in the dtype of its weights."""

    name = "ibq"
    quantize: IbqCodebook

    def __init__(self, config: IbqConfig) -> None:
        super().__init__(config, IbqCodebook(config.num_codes, config.code_dim))
        self.config = config

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the loss ``pixels`` and the losses of the codebook, which are to be added.

        ``index`` and ``commitment`` with ``codebook`` are the paper's double quantisation loss: the first
        compares latents with codes through the softmax, the others as VQ-VAE does. ``entropy`` rewards sure
        choices and a uniform use. The published tokenizers were also trained with a perceptual and an
        adversarial loss.
        """
        return self.reconstruct(pixels).named_losses(pixels)

    def reconstruct(self, pixels: Tensor) -> Reconstruction:
        """Encode and decode pixels (N, 3, H, W); gradients reach all codes."""
        latents = self.latents(pixels)  # (N, P, code_dim)
        scores = self.quantize.scores(latents)  # (N, P, K)
        soft_vectors, vectors = self.quantize.select(scores)
        decoded = self.decode_vectors(soft_vectors, self.grid(*pixels.shape[-2:]))
        losses = {
            "index": F.mse_loss(soft_vectors, latents),
            "commitment": F.mse_loss(latents, vectors.detach()),
            "codebook": self.config.codebook * F.mse_loss(vectors, latents.detach()),
        }
        if self.config.entropy:
            entropy = entropy_loss(scores / self.config.entropy_temperature)
            losses["entropy"] = self.config.entropy * entropy
        return Reconstruction(decoded, losses, "l1", scores.argmax(-1))

    def read_pretrained(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Read the published files; of EMA and trained weights, the EMA weights."""
        levels = len(self.config.channel_multipliers)
        prefix = find_prefix(weights, self.name)
        return ema_weights_first(weights, prefix, self, lambda name: own_name(name, levels))


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register this tokenizer."""
    registry.add("ibq", IbqTokenizer, IbqConfig)
