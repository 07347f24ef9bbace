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


def truncate(logits: Tensor, top_k: Tensor | int = 0, top_p: Tensor | float = 1.0) -> Tensor:
    """Return logits (R, V) with all but the likeliest at -inf.

    Keeps the ``top_k`` likeliest (0: all), and of those the fewest whose probabilities reach
    ``top_p``; never fewer than one. Limits may be scalar tensors, so that a graph can take them.
    """
    ordered, order = logits.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    within = (rank < top_k) | (torch.as_tensor(top_k, device=logits.device) == 0)  # (V,)
    p = ordered.masked_fill(~within, float("-inf")).softmax(-1)  # (R, V)
    keep = within & ((p.cumsum(-1) - p < top_p) | (rank == 0))  # what comes before it is not enough yet
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), float("-inf"))
