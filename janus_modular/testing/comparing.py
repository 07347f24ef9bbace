"""Compares results exactly, or up to the rounding of sums in another order."""

from __future__ import annotations

from typing import Any

import torch

from janus_modular.testing.calls import tensors
from janus_modular.testing.check import ensure

TOLERANCE = 1e-4
"""Tolerance, relative to the largest value: float32 sums of thousands of terms through dozens of layers."""

FLIPPED = 0.01
"""Fraction of ids that may differ: rounding decides between two codes that are equally near."""

NOT_FINITE = "the output is not finite"


def ensure_close(actual: Any, expected: Any, label: str, *, tolerance: float = TOLERANCE) -> None:
    """Check that tensors are equal up to ``tolerance`` times the largest value; of ids, a few may differ.

    Raises:
        CheckError: shapes or values differ; contains the difference. Or values are not finite.
    """
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        ensure(x.shape == y.shape, f"{label}: shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if not y.numel():
            continue
        if y.is_floating_point():
            ensure(bool(x.isfinite().all() and y.isfinite().all()), f"{label}: {NOT_FINITE}")
            difference, scale = float((x - y).abs().max()), float(y.abs().max())
            ensure(
                difference <= tolerance * max(scale, 1e-3),
                f"{label}: a difference of {difference:.2e}, at values up to {scale:.2e}",
            )
        else:
            fraction = float((x != y).float().mean())
            ensure(fraction <= FLIPPED, f"{label}: {fraction:.1%} of the ids differ")


def ensure_equal(actual: Any, expected: Any, label: str) -> None:
    """Check that tensors are equal to the bit.

    Raises:
        CheckError: the tensors differ, or hold NaN.
    """
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        has_nan = bool(x.isnan().any() or y.isnan().any())  # NaN does not equal NaN
        ensure(torch.equal(x, y), f"{label}: {NOT_FINITE if has_nan else 'the results differ'}")
