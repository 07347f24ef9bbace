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


def ensure_close(actual: Any, expected: Any, label: str, *, tolerance: float = TOLERANCE) -> None:
    """Check that tensors are equal up to ``tolerance`` times the largest value; of ids, a few may differ.

    Raises:
        CheckError: shapes or values differ; contains the difference.
    """
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        ensure(x.shape == y.shape, f"{label}: shapes {tuple(x.shape)} and {tuple(y.shape)}")
        if not y.numel():
            continue
        if y.is_floating_point():
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
        CheckError: the tensors differ.
    """
    for x, y in zip(tensors(actual), tensors(expected), strict=True):
        ensure(torch.equal(x, y), f"{label}: the results differ")
