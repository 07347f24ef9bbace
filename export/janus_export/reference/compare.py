"""Measures of agreement between a graph and the model, and their limits by precision of the weights.

A precision is "exact" (float32), "half" (16 bits), or 8 or 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from janus_export.reference.recording import Array
from janus_export.reference.target import CheckResult
from janus_modular.graph_specs import GraphRole

CLOSE = 1e-4  # relative to the largest number: float32 sums in another order
SAME_CODES = 0.995  # minimum share of equal codes in float32: two codes may be equally near

# The limits below are between the results of correct and of broken variants, measured on a small model with
# random weights (std 0.3, which enlarges every error) and on the demo's trained model; the worse of both:
#                                     bfloat16   8 bits    4 bits   broken: another row's, or black
# numbers of one graph, off by ...      0.0057    0.018      0.19   1.3
# pixels, off by ... of the contrast    0.0089   (convolutions are not rounded)   1 or more
# choices of one graph, the same          94 %     94 %      78 %
# choices along a drawing, the same       98 %     94 %     96 % *  8 to 19 %
# cosine along answers and drawings     0.9998    0.998    0.993 *  0.17
# * Trained. With random weights 4 bits give 49 % and 0.84, and fail.
MAX_ERROR: dict[str | int, float] = {"half": 0.045, 8: 0.14, 4: 0.44}
"""Largest relative error: what the cosines below permit for vectors of equal length."""
MIN_COSINE: dict[str | int, float] = {"half": 0.999, 8: 0.99, 4: 0.9}
"""Minimum cosine over a whole run, in which errors of many layers and steps add up."""
SAME_CHOICES: dict[str | int, float] = {"half": 0.9, 8: 0.85, 4: 0.6}
"""Minimum share of equal ids; bfloat16 changes two of 32 codes, the smallest image of the tests."""
AGREEING = 0.9  # share of equal most likely tokens, where the model's is clear; trained, 4 bits: 97 %
CLEAR_MARGIN = 1.0  # a clear choice leads the second by at least this, in nats
LEAST_CLEAR = 10  # minimum number of clear choices: one of fewer would be over 10 %


def compare_outputs(
    graph: str,
    role: GraphRole | None,
    names: Sequence[str],
    precision: str | int,
    got: Sequence[Sequence[Array]],
    want: Sequence[Sequence[Array]],
    floats: str | int | None = None,
) -> Iterator[CheckResult]:
    """Compare the outputs (in the order of ``names``) that calls of a graph gave with those of torch.

    Ids that a graph with the role "sample" chooses have to be the same; its other outputs are compared for
    rows whose ids are. ``floats`` is the precision of floating-point outputs, where it is not ``precision``.
    """
    samples = role == "sample"
    for index, name in sorted(enumerate(names), key=lambda item: want[0][item[0]].dtype != np.int64):
        label = graph if len(names) == 1 else f"{graph}: {name}"
        pairs = [(actual[index], expected[index]) for actual, expected in zip(got, want, strict=True)]
        if samples and want[0][index].dtype != np.int64:
            kept = [_same_ids(*calls, len(calls[1][index])) for calls in zip(got, want, strict=True)]
            pairs = [(x[rows], y[rows]) for (x, y), rows in zip(pairs, kept, strict=True)]
            if not any(len(y) for _, y in pairs):
                yield CheckResult(label, False, "no id is the same", "some to compare")
                continue
        is_float = np.issubdtype(want[0][index].dtype, np.floating)
        yield compare(
            label,
            precision if floats is None or not is_float else floats,
            *(np.concatenate([np.atleast_1d(pair[side]) for pair in pairs]) for side in (0, 1)),
            least=1 if samples else SAME_CODES,
        )


def _same_ids(got: Sequence[Array], want: Sequence[Array], rows: int) -> Array:
    """Return for which of ``rows`` all ids are the same; rows may be a multiple of the ids (N, ...)."""
    same = np.ones(rows, np.bool_)
    for actual, expected in zip(got, want, strict=True):
        if expected.dtype == np.int64 and len(expected) and rows % len(expected) == 0:
            same &= rows_equal(actual, expected, rows)
    return same


def compare(label: str, precision: str | int, got: Array, want: Array, *, least: float = 1) -> CheckResult:
    """Compare choices by how many are the same, pixels and numbers by their distance.

    ``least``: the share of choices that must be the same in float32.
    """
    if want.dtype == np.int64:
        least = SAME_CHOICES.get(precision, least)
        share = float((got == want).mean())
        return CheckResult(label, share >= least, f"{share:.2%} of {want.size} the same", f">= {least:.1%}")
    is_pixels, got, want = want.dtype == np.uint8, got.astype(np.float32), want.astype(np.float32)
    if precision != "exact":
        off, of = relative_error(got, want, centre=is_pixels), "contrast" if is_pixels else "length"
        return CheckResult(
            label, off <= MAX_ERROR[precision], f"off by {off:.4f} of its {of}", f"<= {MAX_ERROR[precision]}"
        )
    if is_pixels:
        off = float(np.abs(got - want).max())
        return CheckResult(label, off <= 1, f"pixels {off:.0f} of 255 apart", "at most 1")
    off = distance(got, want)
    return CheckResult(label, off <= CLOSE, f"{off:.1e}", f"<= {CLOSE:.0e}")


def compare_directions(label: str, precision: str | int, got: Array, want: Array) -> CheckResult:
    """Compare arrays (M, N) by their cosine over all values; also report the lowest cosine of single rows."""
    tiny = np.float32(1e-30)
    rows = (got * want).sum(-1) / np.maximum(
        np.linalg.norm(got, axis=-1) * np.linalg.norm(want, axis=-1), tiny
    )
    cosine = float((got * want).sum() / max(np.linalg.norm(got) * np.linalg.norm(want), tiny))
    measured = f"{cosine:.5f}; of single steps {rows.min():.5f} or more"
    return CheckResult(label, cosine >= MIN_COSINE[precision], measured, f">= {MIN_COSINE[precision]}")


def relative_error(got: Array, want: Array, *, centre: bool = False) -> float:
    """Return the norm of the difference, relative to the expected values', optionally minus their mean.

    Unlike a cosine it also sees an answer that is too large or too small.
    """
    length = np.linalg.norm(want - want.mean() if centre else want)
    off = float(np.linalg.norm(got - want) / max(float(length), 1e-30))
    return off if np.isfinite(off) else float("inf")


def rows_equal(got: Array, want: Array, rows: int) -> Array:
    """Return for each of ``rows`` whether its ids are the same; with guidance two rows share their ids.

    Ids are (N,), or (N, S) for several codes per position.
    """
    same = (got == want).reshape(len(want), -1).all(axis=1)
    return np.tile(same, rows // len(want))


def magnitude(value: Array) -> float:
    """Return the largest absolute value, 0 of none; infinity where any number is NaN."""
    largest = float(np.abs(value).max(initial=0.0))
    return largest if np.isfinite(largest) else float("inf")


def distance(got: Array, want: Array) -> float:
    """Return the largest difference, as a share of the largest number (of 1 where that is smaller)."""
    if not want.size:
        return 0.0
    off = float(np.abs(got - want).max()) / max(1.0, float(np.abs(want).max()))
    return off if np.isfinite(off) else float("inf")
