"""Whether two results are the same, up to the rounding of another order of sums."""

from __future__ import annotations

from typing import Any

import torch

from janus_modular.testing.calls import tensors
from janus_modular.testing.check import ensure

SLACK = 1e-4
"""Of the largest value: float32 sums of some thousand terms, through some dozen layers, in another order."""

FLIPPED = 0.01
"""Share of ids that may differ: where two codes are equally near, rounding decides between them."""


def ensure_same(found: Any, wanted: Any, what: str, *, slack: float = SLACK) -> None:
    """Compare two results, tensor by tensor: numbers within ``slack`` of the largest, ids but for a few.

    Raises:
        CheckError: says how far apart they are.
    """
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    for one, other in pairs:
        ensure(one.shape == other.shape, f"{what}: shapes {tuple(one.shape)} and {tuple(other.shape)}")
        if not other.numel():
            continue
        if other.is_floating_point():
            apart, size = float((one - other).abs().max()), float(other.abs().max())
            ensure(apart <= slack * max(size, 1e-3), f"{what}: {apart:.2e} apart, at values up to {size:.2e}")
        else:
            differ = float((one != other).float().mean())
            ensure(differ <= FLIPPED, f"{what}: {differ:.1%} of the ids differ")


def ensure_identical(found: Any, wanted: Any, what: str) -> None:
    """Compare two results to the bit.

    Raises:
        CheckError: they differ.
    """
    for one, other in zip(tensors(found), tensors(wanted), strict=True):
        ensure(torch.equal(one, other), f"{what}: the results differ")
