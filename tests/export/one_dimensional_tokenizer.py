"""A plugin with a tokenizer without a grid: an image is a few latent tokens, of no place in the image.

The encoder is a transformer over patches and learned queries; what it makes of the queries is quantised. The
decoder is a transformer over the codes' vectors and a mask token for each patch ("An image is worth 32 tokens
for reconstruction and generation", section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from janus_modular import ComponentConfig, ImageTokenizer, Registry, hookimpl


@dataclass
class LatentTokensConfig(ComponentConfig):
    """Sizes."""

    tokens: int = 8  # of an image, whatever its size
    num_codes: int = 32
    code_dim: int = 6
    dim: int = 16
    side: int = 32  # of images, in pixels
    patch: int = 8


class Blocks(nn.Module):
    """A transformer without attention masks."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.query_key_value, self.output = (
            nn.LayerNorm(dim),
            nn.Linear(dim, 3 * dim),
            nn.Linear(dim, dim),
        )
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens (N, T, C)."""
        q, k, v = self.query_key_value(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.output(attended)
        return x + self.mlp(x)


class LatentTokens(nn.Module):
    """Images in [-1, 1] to a few codes and back."""

    value_range = (-1.0, 1.0)

    def __init__(self, config: LatentTokensConfig) -> None:
        super().__init__()
        self.config = config
        self.codebooks: tuple[int, ...] = (config.num_codes,)
        self.code_dim: int | None = config.code_dim
        self.rows = config.side // config.patch
        patches = self.rows**2
        self.patches = nn.Conv2d(3, config.dim, config.patch, stride=config.patch)
        self.positions = nn.Parameter(0.3 * torch.randn(patches, config.dim))
        self.queries = nn.Parameter(0.3 * torch.randn(config.tokens, config.dim))
        self.encoder, self.decoder = Blocks(config.dim), Blocks(config.dim)
        self.to_code, self.from_code = (
            nn.Linear(config.dim, config.code_dim),
            nn.Linear(config.code_dim, config.dim),
        )
        self.codebook = nn.Embedding(config.num_codes, config.code_dim)
        self.mask = nn.Parameter(0.3 * torch.randn(patches, config.dim))
        self.numbers = nn.Parameter(0.3 * torch.randn(config.tokens, config.dim))
        self.to_pixels = nn.Linear(config.dim, 3 * config.patch**2)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return one row: a token corresponds to no place of the image."""
        if (height, width) != (self.config.side, self.config.side):
            raise ValueError(
                f"latent-tokens: {height}x{width}; expected {self.config.side}x{self.config.side}"
            )
        return 1, self.config.tokens

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, 3, H, W) into code ids (N, P)."""
        latents = self._latents(pixels).float()  # (N, P, code_dim)
        table = self.codebook.weight.float()
        distance = (latents.unsqueeze(-2) - table).square().sum(-1)  # (N, P, K)
        return distance.argmin(-1)

    def decode(self, codes: Tensor, *, height: int, width: int) -> Tensor:
        """Decode code ids (N, P) into pixels (N, 3, height, width)."""
        self.grid(height, width)
        return self._decode_vectors(self.codebook(codes))

    def codebook_embeddings(self) -> Tensor:
        """Return the codebook (K, code_dim)."""
        return self.codebook.weight.detach()

    def losses(self, pixels: Tensor) -> Mapping[str, Tensor]:
        """Return the reconstruction error, and the distance of latents from their codes."""
        latents = self._latents(pixels)
        vectors = self.codebook(self.encode(pixels))
        passed = latents + (vectors - latents).detach()  # straight through
        images = self._decode_vectors(passed)
        return {
            "pixels": F.mse_loss(images, pixels),
            "commitment": F.mse_loss(latents, vectors.detach()) + F.mse_loss(vectors, latents.detach()),
        }

    def _latents(self, pixels: Tensor) -> Tensor:
        patches = (
            self.patches(pixels.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2) + self.positions
        )
        queries = self.queries.expand(patches.shape[0], -1, -1)
        encoded = self.encoder(torch.cat([patches, queries], 1))
        return self.to_code(encoded[:, patches.shape[1] :])

    def _decode_vectors(self, vectors: Tensor) -> Tensor:
        tokens = self.from_code(vectors) + self.numbers
        mask = self.mask.expand(tokens.shape[0], -1, -1)
        decoded = self.decoder(torch.cat([tokens, mask], 1))[:, tokens.shape[1] :]  # (N, patches, C)
        squares = self.to_pixels(decoded).unflatten(-1, (3, self.config.patch, self.config.patch))
        image = squares.unflatten(1, (self.rows, self.rows)).permute(0, 3, 1, 4, 2, 5)
        return image.flatten(4, 5).flatten(2, 3)


@hookimpl
def register_image_tokenizers(registry: Registry[ImageTokenizer]) -> None:
    """Register this tokenizer."""
    registry.add("latent-tokens", LatentTokens, LatentTokensConfig)
