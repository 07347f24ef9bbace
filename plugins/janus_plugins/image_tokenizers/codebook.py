"""The codebook of vector-quantising tokenizers, and their common losses."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Codebook(nn.Module):
    """K vectors, and the search for the nearest.

    With ``unit``, vectors and latents are normalised: the nearest vector has the smallest angle.
    """

    def __init__(self, num_codes: int, code_dim: int, *, unit: bool = False) -> None:
        super().__init__()
        self.unit = unit
        self.embedding = nn.Embedding(num_codes, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)
        self.embedding.weight.data = self.normalize(self.embedding.weight.data)

    def normalize(self, vectors: Tensor) -> Tensor:
        """Normalise vectors (..., code_dim) if ``unit`` is set."""
        return F.normalize(vectors, dim=-1) if self.unit else vectors

    def vectors(self) -> Tensor:
        """Return all vectors (K, code_dim)."""
        return self.normalize(self.embedding.weight)

    def forward(self, codes: Tensor) -> Tensor:
        """Look up code ids (...) as vectors (..., code_dim)."""
        return self.normalize(self.embedding(codes))

    def scores(self, latents: Tensor) -> Tensor:
        """Score all codes (..., K) for latents z (..., code_dim): |z|² minus the squared distance.

        Computed in float32: bf16 cannot distinguish the distances of 16,384 codes.
        """
        vectors = self.vectors().float()
        return 2 * latents.float() @ vectors.T - vectors.square().sum(-1)

    def nearest(self, latents: Tensor) -> Tensor:
        """Return the ids (...) of the codes nearest to latents (..., code_dim)."""
        return self.scores(latents).argmax(-1)


def straight_through(latents: Tensor, vectors: Tensor) -> Tensor:
    """Return the vectors, with gradients that pass to the latents unchanged (van den Oord et al. 2017)."""
    return latents + (vectors - latents).detach()


def entropy_loss(logits: Tensor) -> Tensor:
    """Reward confident choices and a uniform use: mean H(p) - H(mean p), p = softmax of logits (..., K)."""
    logits = logits.flatten(0, -2)
    probabilities = logits.softmax(-1)
    entropy = -(probabilities * logits.log_softmax(-1)).sum(-1).mean()
    mean = probabilities.mean(0)
    return entropy + (mean * (mean + 1e-5).log()).sum()
