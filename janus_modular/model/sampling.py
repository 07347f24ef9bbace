"""Samples ids from logits. Noise is an input, so that every runtime samples the same ids."""

from __future__ import annotations

import torch
from torch import Tensor

from janus_modular.finite import NOT_FINITE


def sample_with_noise(logits: Tensor, noise: Tensor) -> Tensor:
    """Return an id (R,) sampled from each row of logits (R, V).

    With e ~ Exp(1), argmax(p / e) is a sample of the distribution p: the smallest of the exponential
    waiting times e / p is that of id i with probability p_i. Noise of ones gives the most likely id.
    """
    return (logits.float().softmax(-1) / noise).argmax(-1)


def mark_not_finite(ids: Tensor, logits: Tensor) -> Tensor:
    """Return ids (R,) with `NOT_FINITE` in place of those from logits (R, V) that are NaN or infinite.

    An argmax over NaN is an ordinary id, and a graph cannot raise; the mark lets a session raise once the id
    is on the host. Logits of -inf suppress ids; a row is marked if all its logits are -inf. Embed the ids
    before they are marked.
    """
    return torch.where(logits.softmax(-1)[..., 0].isnan(), NOT_FINITE, ids)


BITS, REACH = 22, 64.0
"""The filter resolves logits that differ by REACH / 2**BITS, and ranks are exact in float32 up to 2**BITS.
An id REACH below the most likely has a probability of at most e**-64."""


def top_k_top_p_filter(logits: Tensor, top_k: Tensor | int = 0, top_p: Tensor | float = 1.0) -> Tensor:
    """Return logits (R, V) with all but the most likely ids at -inf.

    Keeps the ``top_k`` most likely (0: all), and of these the fewest whose probabilities reach ``top_p``: at
    least one id, and of equal logits all or none. Limits may be scalar tensors, as a graph's inputs are.
    Nothing is sorted: TensorRT orders at most 3840 numbers, and ONNX Runtime takes twice as long to sort a
    vocabulary.
    """
    vocab = logits.shape[-1]
    top_k, top_p = (torch.as_tensor(limit, device=logits.device) for limit in (top_k, top_p))
    behind = logits.amax(-1, keepdim=True) - logits  # (R, V)
    ranks = (behind * (2.0**BITS / REACH)).floor().clamp(max=2.0**BITS - 1)
    keep = _within(ranks, torch.ones_like(ranks), torch.where(top_k == 0, vocab, top_k))
    p = torch.where(keep, (-behind).exp(), 0.0)
    keep = keep & (_within(ranks, p, top_p * p.sum(-1, keepdim=True)) | (top_p >= 1))
    return logits.masked_fill(~keep, float("-inf"))


def _within(ranks: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Return for each rank (R, V) whether the weights (R, V) of all lower ranks sum to less than a target.

    The largest such rank is found bit by bit, the highest first, and subtracted from all ranks meanwhile: if
    it were a separate value, a compiler that fuses the steps would double the work at each.
    """
    for bit in reversed(range(BITS)):
        lower = torch.where(ranks < 2.0**bit, weights, 0.0).sum(-1, keepdim=True)  # (R, 1)
        ranks = ranks - 2.0**bit * (lower < target).to(ranks.dtype)
    return ranks <= 0
