"""The arithmetic of choosing the next id. Noise is an input, so a run is the same in every runtime."""

from __future__ import annotations

import torch
from torch import Tensor


def pick(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw one id (R,) from each row of logits (R, V).

    With e ~ Exp(1), argmax(p / e) is one draw from the distribution p: the smallest of exponential
    waiting times e / p belongs to id i with probability p_i. Noise of ones takes the likeliest.
    """
    return (logits.float().softmax(-1) / noise).argmax(-1)


def truncate(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return logits (R, V) with all but the likeliest at -inf.

    Keeps the ``top_k`` likeliest (0: all), and of those the fewest whose probabilities reach
    ``top_p``; never fewer than one.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p  # what comes before it is enough already
        beyond[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return logits
